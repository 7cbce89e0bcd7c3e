"""Reading and writing SAEs in the formats of other libraries. A new one is a file here and a line in `FORMATS`.

Exports hold an SAE of raw activations, float32: scales are folded in, each format in its own convention, and noted
beside it, so that an import of our own export is the SAE that was trained. A format refuses what it cannot express.
"""

from __future__ import annotations

from pathlib import Path

from sae_ray.errors import UserError
from sae_ray.sae.formats import dictionary_learning, gemma_scope, saelens, sparsify
from sae_ray.sae.formats.fit import check_fits
from sae_ray.sae.formats.notes import Format, Found, Provenance
from sae_ray.sae.inference import TrainedSAE

__all__ = [
    "FORMATS",
    "Provenance",
    "check_fits",
    "detect",
    "export_sae",
    "export_saelens",
    "import_sae",
    "import_saelens",
    "read_sae",
]

FORMATS: dict[str, Format] = {
    module.FORMAT.name: module.FORMAT for module in (saelens, sparsify, dictionary_learning, gemma_scope)
}


def import_sae(path: str | Path, format: str | None = None) -> TrainedSAE:
    """The SAE that a folder (or its file of weights) holds, in float32 on the CPU.

    Args:
        format: of `FORMATS`; None tells it by the files that are there.
    Raises:
        UserError: a file, tensor or key is missing, unreadable, of another shape or not finite, or says something
            that cannot be expressed here; the message names it.
    """
    return read_sae(path, format).sae


def read_sae(path: str | Path, format: str | None = None) -> Found:
    """`import_sae`, and where the SAE says that its inputs come from."""
    path = Path(path)
    format = format or detect(path)
    try:
        return _format(format).read(path.parent if path.is_file() else path)
    except RecursionError as error:  # JSON can be nested as deep as is allowed to be read, but not to be shown
        raise UserError(f"{path}: its config is nested too deeply") from error


def export_sae(sae: TrainedSAE, path: str | Path, format: str, provenance: Provenance) -> Path:
    """Writes an SAE into the folder `path`. Returns the folder.

    Raises:
        UserError: the format cannot express it (the message says which could), or the folder cannot be written or
            holds an SAE in another format.
    """
    folder, wanted = Path(path), _format(format)
    transcoder = sae.is_transcoder or provenance.hook_out is not None
    if transcoder and sae.subtract_b_dec:
        raise UserError(f"{folder}: a transcoder cannot subtract b_dec, which is of its output, from its input")
    if (reason := wanted.refusal(sae, transcoder)) is not None:
        could = [name for name, other in FORMATS.items() if other.refusal(sae, transcoder) is None]
        raise UserError(f"{format} cannot express {reason}; {' and '.join(could) if could else 'no known format'} can")
    if there := [name for name, other in FORMATS.items() if name != format and (folder / other.weights).exists()]:
        raise UserError(
            f"{folder}: holds an SAE in {there[0]}'s format; two formats in one folder overwrite each other"
        )
    try:
        wanted.write(sae.to("cpu"), folder, provenance)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from error
    return folder


def detect(path: str | Path) -> str:
    """The format of a folder or file, by the names of its files.

    Raises:
        UserError: none is there, or more than one.
    """
    path = Path(path)
    if path.is_file():
        found = [name for name, known in FORMATS.items() if known.weights == path.name]
    else:
        found = [name for name, known in FORMATS.items() if (path / known.weights).is_file()]
    if not found:
        wanted = ", ".join(f"{known.weights} ({name})" for name, known in FORMATS.items())
        what = "is no" if path.is_file() else "holds no" if path.is_dir() else "does not exist; expected"
        raise UserError(f"{path}: {what} {wanted}")
    if len(found) > 1:
        raise UserError(f"{path}: holds SAEs in the formats {' and '.join(found)}; name the one to read")
    return found[0]


def export_saelens(
    sae: TrainedSAE, folder: str | Path, *, model: str, hook: str, context_length: int, dataset: str = ""
) -> Path:
    return export_sae(sae, folder, "saelens", Provenance(model, hook, context_length, dataset))


def import_saelens(folder: str | Path) -> TrainedSAE:
    return import_sae(folder, "saelens")


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise UserError(f"format {name!r} is unknown; known: {', '.join(FORMATS)}")
    return FORMATS[name]
