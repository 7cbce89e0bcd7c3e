"""Drops the requirements that the overrides switch off (marker `sys_platform == 'never'`) from a lock on stdin."""

import sys

keep = True
for line in sys.stdin:
    if line.strip() and not line.startswith((" ", "#")):
        keep = "sys_platform == 'never'" not in line
    if keep and not line.startswith("#") and line.strip():
        sys.stdout.write(line)
