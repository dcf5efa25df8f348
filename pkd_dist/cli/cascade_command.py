"""`pkd cascade`: how many requests a run's student can answer alone, with the teacher behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pkd_dist.cli.options import require_run, run_command
from pkd_dist.errors import UserError

if TYPE_CHECKING:
    from pkd_dist.evaluation.cascade import Curve, Point
    from pkd_dist.evaluation.predictions import Predictions
    from pkd_dist.evaluation.results import Results


def cascade(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, such as runs/demo.")],
    agreement: Annotated[
        float,
        typer.Option(
            help="Share of the answers given by the student alone that must be the teacher's, between 0 and 1."
        ),
    ] = 0.95,
    output: Annotated[
        Path | None,
        typer.Option(
            help="JSON file to write; must not exist. The plot is beside it, as .png. Default: RUN/cascade.json, written again."
        ),
    ] = None,
) -> None:
    """Say how many requests the student can answer alone, if the teacher answers those of which it is not sure.

    The student is sure if its largest probability reaches a threshold, which is chosen on dev: there the lower end of the 95%
    interval of the agreement is at least --agreement. What it gives on the other splits is measured.

    Example: pkd cascade runs/demo --agreement 0.98
    """

    def work() -> None:
        if not 0 < agreement < 1:
            raise UserError(f"{agreement:g} is not allowed; give a share between 0 and 1, such as 0.99", "--agreement")
        _require_output(output)
        from pkd_dist.evaluation import cascade
        from pkd_dist.evaluation.predictions import FILE
        from pkd_dist.files import sha256, write_atomically, write_json

        answers, results = _evaluated(run)
        curves = {split: cascade.Curve.of(found) for split, found in answers.items()}
        dev = curves[cascade.CHOSEN_ON]
        chosen = cascade.choose(dev, agreement)
        if chosen is None:
            raise UserError(_unreached(dev, agreement))
        at = {split: curve.at(chosen.threshold) for split, curve in curves.items()}
        costs = _costs(run, results)
        file = output or run / "cascade.json"
        content = {
            "agreement": agreement,
            "threshold": chosen.threshold,
            "chosen_on": cascade.CHOSEN_ON,
            "answers_sha256": sha256(run / FILE),
            "temperature": results.get("calibration", {}).get("temperature"),
            "cost": asdict(costs) if costs else None,
            "splits": {split: _as_json(curves[split], point, costs) for split, point in at.items()},
        }
        write_json(file, content)
        figure = cascade.plot(curves, chosen, agreement)
        image = file.with_suffix(".png")
        write_atomically(image, lambda path: figure.savefig(path, format="png", dpi=150))
        print(
            "\n".join(
                [
                    _headline(at, agreement, costs, "option" if "options" in results else "class"),
                    "",
                    *_table(curves, at),
                    "",
                    f"written: {file}, {image}",
                ]
            )
        )

    run_command(work)


def _require_output(output: Path | None) -> None:
    if output is None:
        return
    if output.suffix != ".json":
        raise UserError(f"{output} must end in .json; the plot gets the same name with .png", "--output")
    if not output.parent.is_dir():
        raise UserError(f"no such folder: {output.parent}", "--output")
    for path in (output, output.with_suffix(".png")):
        if path.exists():
            raise UserError(f"{path} exists; choose another name", "--output")


def _evaluated(run: Path) -> tuple[dict[str, Predictions], Results]:
    """Return the answers and the results of a run.

    Raises:
        UserError: It is not evaluated yet, its answers were altered, or it is a regression.
    """
    from pkd_dist.data.examples import unlabelled
    from pkd_dist.evaluation import predictions
    from pkd_dist.files import altered
    from pkd_dist.stages.base import Markers
    from pkd_dist.stages.translation import translate

    require_run(run)
    marker = Markers(run, translate).read("evaluate")
    if marker is None or not marker.done:
        raise UserError(f"{run}: is not evaluated yet; rerun the run's command to resume it")
    path = run / predictions.FILE
    for _, problem in altered([path], marker.files or {}):
        raise UserError(f"{problem}; rerun the run's command to write it again")
    answers = predictions.read(path)
    if any(logits_NC.shape[1] == 1 for found in answers.values() for logits_NC in found.logits.values()):
        raise UserError(f"{run}: is a regression, whose answers have no confidence; give the run of a classification")
    if any(found.multilabel for found in answers.values()):
        raise UserError(
            f"{run}: is a multilabel task, whose answers have no single confidence; give a run with one class a text"
        )
    results: Results = marker.outputs["results"]  # type: ignore[index, assignment]
    if "agreement" in results["student"]:  # its labels are the teacher's predictions
        answers = {
            split: replace(found, labels_N=unlabelled(len(found.ids_N), False)) for split, found in answers.items()
        }
    return answers, results


@dataclass(frozen=True)
class _Costs:
    """Latency of both models at batch 1 (p50), measured in the same session; `student` is the file to deploy."""

    student: str
    student_ms: float
    teacher_ms: float


def _costs(run: Path, results: Results) -> _Costs | None:
    """Return the latencies of the file to deploy and the teacher, else of both in PyTorch.

    None: not measured, as for several teachers, of which only the first was.
    """
    from pkd_dist.export import manifest

    if "ensemble" in results:
        return None
    if (run / "export" / manifest.MANIFEST).is_file():
        content = manifest.read(run / "export")
        table = manifest.deployment_of(content, results, content.get("main_metric", "accuracy"))
        if table.best.speed is not None and table.teacher.speed is not None:
            return _Costs(table.best.file, table.best.speed["latency_ms_p50"], table.teacher.speed["latency_ms_p50"])
    latencies = [results[side].get("latency_ms_p50") for side in ("student", "teacher")]  # type: ignore[literal-required]
    return _Costs("PyTorch", *latencies) if all(latencies) else None


def _unreached(dev: Curve, agreement: float) -> str:
    from pkd_dist.evaluation.cascade import most_certain

    best = most_certain(dev)
    reachable = 100 * float(dev.lowest_agreement().max())
    return (
        f"--agreement: {agreement:g} is not reached on dev at any threshold: at best the 95% interval of the agreement is "
        f"{best.agreement}, where the student answers {100 * best.answered.value:.1f}% of {dev.examples:,} examples; give at "
        f"most {int(10 * reachable) / 1000:g}, or use a larger dev set"
    )


def _as_json(curve: Curve, point: Point, costs: _Costs | None) -> dict[str, object]:
    from pkd_dist.evaluation.cascade import relative_cost

    found = asdict(point)
    found.pop("threshold")
    if costs:
        found["cost"] = relative_cost(point.answered.value, costs.student_ms, costs.teacher_ms)
    return {
        "n": curve.examples,
        **found,
        "accuracy_alone": {side: asdict(share) for side, share in curve.alone.items()},
        "curve": [asdict(each) for each in curve.points()],
    }


def _headline(at: Mapping[str, Point], agreement: float, costs: _Costs | None, answer: str) -> str:
    from pkd_dist.evaluation.cascade import CHOSEN_ON, relative_cost

    split = next((name for name in at if name != CHOSEN_ON), CHOSEN_ON)
    point, where = at[split], "in-sample" if split == CHOSEN_ON else "held out"
    said = f"the student answers {point.answered} of {split} alone ({where})"
    if point.agreement is not None:
        said += f", {point.agreement} of these with the teacher's {answer}"
    lines = [
        said,
        f"threshold: a probability of {point.threshold:.6f}, the lowest on {CHOSEN_ON} where the 95% interval of the agreement is "
        f"above {agreement:g}",
    ]
    if costs:
        cost = relative_cost(point.answered.value, costs.student_ms, costs.teacher_ms)
        lines.append(
            f"a request costs {cost:.2f} of the teacher's time on average: the student ({costs.student}) takes {costs.student_ms:.2f} ms "
            f"for each, the teacher {costs.teacher_ms:.2f} ms for the rest (p50 at batch 1)"
        )
    return "\n".join(lines)


def _table(curves: Mapping[str, Curve], at: Mapping[str, Point]) -> list[str]:
    from pkd_dist.evaluation.deployment import aligned

    rows: list[tuple[str, ...]] = [
        ("", "examples", "answered alone (95%)", "agreement (95%)", "accuracy (95%)", "student alone", "teacher")
    ]
    for split, curve in curves.items():
        point, alone = at[split], curve.alone
        student, teacher = (f"{100 * alone[side].value:.1f}%" if alone else "–" for side in ("student", "teacher"))
        told = (str(share or "–") for share in (point.answered, point.agreement, point.accuracy))
        rows.append((split, f"{curve.examples:,}", *told, student, teacher))
    return aligned(rows)
