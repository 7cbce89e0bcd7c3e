"""From evidence and verdicts to rewards and credit."""
