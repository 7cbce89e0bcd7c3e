"""`sae-ray explain`: one latent on the terminal, its texts coloured by how strongly each token activates it."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sae_ray.activations.subject import load_tokenizer
from sae_ray.config import RunConfig
from sae_ray.config_file import load_config
from sae_ray.errors import UserError, printable
from sae_ray.evidence.files import is_written, read_evidence
from sae_ray.evidence.types import NEAR_MISS, SIBLING, Contexts, Example, LatentEvidence
from sae_ray.judging import results
from sae_ray.judging.gather import evidence_prefix
from sae_ray.report.features import visible
from sae_ray.storage import LocalStorage

SHADES = ("grey37", "gold3", "dark_orange", "orange_red1", "red1")  # of the terminal's 256 colours, weak to strong
STRONGEST, QUANTILE, NEGATIVES = 6, 3, 2


def explain_latent(folder: Path, latent: int, console: Console, kind: str = results.LATENT) -> None:
    """Prints what a judging knows of one latent.

    Raises:
        UserError: `folder` holds no judging, or the latent was not among those judged.
    """
    storage = LocalStorage(folder)
    if not storage.exists("judging.yaml"):
        raise UserError(f"{folder}: holds no judging; `sae-ray judge SAE` makes one and prints its folder")
    config = load_config(folder / "judging.yaml")
    if not is_written(storage, evidence_prefix(kind)):
        raise UserError(f"{folder}: its evidence of {kind}s is not there yet; `sae-ray judge` goes on")
    found = read_evidence(storage, evidence_prefix(kind), load_tokenizer(config.model))
    if latent not in found.latents:
        why = found.skipped.get(latent, "it was not among the latents of this judging")
        raise UserError(f"latent {latent}: {why}; judged are {_some(sorted(found.latents))}")
    scores = {name: row for (k, i, name), row in _scores(storage).items() if (k, i) == (kind, latent)}
    _print(config, found.latents[latent], found.contexts, scores, console)


def _scores(storage: LocalStorage) -> dict[tuple[str, int, str], dict[str, object]]:
    return results.latest(results.read(storage, "scores"))


def _print(
    config: RunConfig,
    latent: LatentEvidence,
    contexts: Contexts,
    scores: dict[str, dict[str, object]],
    console: Console,
) -> None:
    where = printable(f"  {config.hook.name} of {config.model.name}")
    title = Text.assemble((f"latent {latent.latent}", "bold"), where)
    console.print(title, soft_wrap=True)
    first = next(iter(scores.values()), None)
    if first is not None:
        console.print(
            Text.assemble(
                ("means: ", "dim"),
                (printable(str(first["explanation"])), "bold cyan"),
                printable(f"  ({first['explainer']})"),
            )
        )
    table = Table(box=None, pad_edge=False)
    for heading in ("scorer", "value", "95% interval", "shuffled", "chance", "n"):
        table.add_column(
            heading, justify="left" if heading == "scorer" else "right", style="" if heading != "chance" else "dim"
        )
    for name, row in scores.items():
        table.add_row(
            name, _f(row["value"]), f"{_f(row['low'])} to {_f(row['high'])}", _f(row["shuffled"]), _f(row["chance"]),
            str(row["n"]),
        )  # fmt: skip
    if scores:
        console.print(table)
    facts = [
        f"fires on {latent.density:.3%} of tokens, in {latent.contexts_active:.2%} of texts",
        f"entropy of its tokens {latent.firing_entropy:.2f} nats",
        f"{latent.unigram_share:.0%} on one token",
    ]
    console.print(Text("; ".join(facts), style="dim"), soft_wrap=True)
    if latent.top_tokens:
        pieces = [f"{contexts.tokenizer.decode([token])!r} {share:.0%}" for token, share in latent.top_tokens[:8]]
        console.print(Text.assemble(("fires on: ", "dim"), ", ".join(pieces)), soft_wrap=True)
    for label, some in (("promotes: ", latent.promoted), ("suppresses: ", latent.suppressed)):
        if some:
            console.print(Text.assemble((label, "dim"), ", ".join(repr(text) for text, _ in some[:10])), soft_wrap=True)
    if latent.siblings:
        near = ", ".join(f"{other} (cosine {cosine:.2f})" for other, cosine, _ in latent.siblings[:5])
        console.print(Text.assemble(("siblings: ", "dim"), near), soft_wrap=True)
    ordered = sorted(latent.positives("score"), key=lambda e: -float(e.acts_S.max()))
    rest = ordered[STRONGEST:]
    step = max(1, len(rest) // QUANTILE)
    _examples("strongest", ordered[:STRONGEST], latent, contexts, console)
    _examples("weaker", rest[step // 2 :: step][:QUANTILE], latent, contexts, console)
    _examples("near misses", latent.negatives("score", NEAR_MISS)[:NEGATIVES], latent, contexts, console)
    _examples("texts of siblings", latent.negatives("score", SIBLING)[:NEGATIVES], latent, contexts, console)


def _examples(
    title: str, examples: list[Example], latent: LatentEvidence, contexts: Contexts, console: Console
) -> None:
    if not examples:
        return
    console.print(Text(title, style="bold dim"))
    for example in examples:
        console.print(
            Text.assemble("  ", coloured(contexts.pieces(example.context), example, latent.max_activation)),
            soft_wrap=True,
        )


def coloured(pieces: list[str], example: Example, strongest: float) -> Text:
    """A text with each token in the shade of its activation; on a terminal without colours the peak stands in [[ ]]."""
    line = Text()
    for place, (piece, value) in enumerate(zip(pieces, example.acts_S, strict=False)):
        shown = visible(piece, lit=value > 0)
        if value <= 0:
            line.append(shown)
            continue
        shade = SHADES[min(len(SHADES) - 1, int(value / max(strongest, 1e-9) * len(SHADES)))]
        mark = ("[[", "]]") if place == example.peak else ("", "")
        line.append(f"{mark[0]}{shown}{mark[1]}", style=f"bold {shade}")
    return line


def _some(latents: list[int]) -> str:
    shown = ", ".join(map(str, latents[:8]))
    return shown + (f", ... ({len(latents)} in all)" if len(latents) > 8 else "")


def _f(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else "-"
