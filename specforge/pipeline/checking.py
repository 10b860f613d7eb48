"""Whether a draft folder is what servers take it for, and whether it fits its target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.table import Table

from specforge import launch
from specforge.alignment import prediction_depth
from specforge.config import CheckSettings
from specforge.console import console, is_main_rank, say, show_error
from specforge.data import prepared
from specforge.data.tokenize import ChatTokenizer
from specforge.draft import folder as draft_folder
from specforge.draft import layouts
from specforge.draft.inspection import Finding, Subject, beyond, inspect
from specforge.draft.model import Eagle3Draft
from specforge.errors import ConfigError
from specforge.evaluate.acceptance import surprise, teacher_forced
from specforge.evaluate.agreement import Agreement, agreement
from specforge.evaluate.shape import Shape
from specforge.features.sources import LiveSource
from specforge.features.store import Store
from specforge.pipeline.shared import (
    SERVED_STEPS,
    check_lengths,
    check_target,
    drafting_dtype,
    leave,
    say_serving,
    start_engine,
    watched,
)
from specforge.records import HARDLY, Acceptance, Example, FeatureBatch, FeatureRecord, Ranks, TargetEngine, TargetInfo
from specforge.target import engine as engines
from specforge.target import weights

CLEARLY_NATS, CLEARLY_SIGMA = 0.02, 4.0  # other layers fit better only where it is no accident, and matters
COMPARED, MEASURED, NEIGHBOURS = "SGLang's class", "acceptance", "layers fed"
MEANS = {  # what a check without findings has seen
    "config": "sizes, one layer, nothing that a server would not honour",
    "keys": "every tensor of an EAGLE-3 draft, and no other",
    "shapes": "those of the config",
    "dtypes": "as servers read them, all values finite",
    "d2t, t2d": "ascending, and the same tokens in both",
    "layer ids": "for SGLang and vLLM, the same layers, which the target has",
    "sizes": "hidden size and vocabulary of the target",
    "rope": "the target's, and its whole context",
    "tokenizer": "the target's ids; special tokens are in the draft vocabulary",
}
LOOK_FOR = (
    "look whether the layer ids are those that the draft was trained on, the target the one that it was trained for, "
    "the template the one of its data, and whether it was trained at all"
)


@dataclass(slots=True)
class Report:
    """What was checked, in order, with what was found."""

    folder: Path
    findings: list[Finding] = field(default_factory=list)
    rows: list[tuple[str, str, str]] = field(default_factory=list)  # check, verdict, detail

    @property
    def passed(self) -> bool:
        return not any(finding.fault for finding in self.findings)

    def add(self, check: str, found: Sequence[Finding], detail: str) -> None:
        """`detail` is shown where nothing was found."""
        self.findings += found
        verdict = "fault" if any(one.fault for one in found) else "note" if found else "ok"
        self.rows.append((check, verdict, f"{len(found)} below" if found and check in MEANS else detail))

    def skip(self, check: str, why: str) -> None:
        self.rows.append((check, "not done", why))

    def show(self) -> None:
        """The table, then every finding with what, where and fix."""
        colours = {"ok": "green", "fault": "bold red", "note": "yellow", "not done": "dim"}
        table = Table(title=str(self.folder), title_justify="left")
        for name in ("check", "", "what was seen"):
            table.add_column(name)
        for check, verdict, detail in self.rows:
            table.add_row(check, f"[{colours[verdict]}]{verdict}[/]", detail)
        if not is_main_rank():
            return
        console.print(table)
        for finding in self.findings:
            if finding.fault:
                show_error(str(finding))
            else:
                console.print("[yellow]note[/] ", end="")
                console.print(str(finding), markup=False)


def check(settings: CheckSettings) -> int | None:
    if settings.features and settings.data:
        raise ConfigError("real features come from one place", where="--features, --data", fix="give one of them")
    info = weights.describe(settings.model_path, settings.trust_remote_code)
    tokenizer = ChatTokenizer(settings.model_path, settings.chat_template, settings.trust_remote_code)
    found = layouts.read(settings.folder)
    report = _structure(found, info, tokenizer)
    if not found.names_layers:  # as both servers would
        found = layouts.with_layers(found, weights.default_aux_layers(info.num_layers))
    why = _cannot_run(settings, found, report)
    if why:
        for name in (COMPARED, MEASURED, NEIGHBOURS):
            report.skip(name, why)
        _say_fingerprint(report, found, info, measured=False)
        return _end(report, settings)
    engines.check_tp(info, settings.tp_size, settings.engine)
    code = launch.start_ranks(settings.tp_size, replicas=False)
    if code is not None:
        return code
    ranks = launch.join(settings.tp_size)
    _with_features(settings, report, found, info, tokenizer, ranks)
    _say_fingerprint(report, found, info, measured=True)
    result = _end(report, settings)
    leave(ranks)
    return result


def after_training(
    folder: Path,
    info: TargetInfo,
    tokenizer: ChatTokenizer,
    engine: TargetEngine | None,
    records: Sequence[FeatureRecord],
    ranks: Ranks,
) -> bool:
    """The short form: structure, and equal logits on `records` where an engine runs. Whether the draft passed. Says
    one line where it does; every rank of a replica with an engine calls it."""
    found = layouts.read(folder)
    report = _structure(found, info, tokenizer)
    said = "SGLang's class was not asked: no engine ran"
    if report.passed and engine is not None:
        seen = _compare(report, found, info, engine, records, ranks)
        said = _said(seen) if isinstance(seen, Agreement) else f"SGLang's class was not asked: {seen}"
    if report.passed:
        say(f"checked: keys, shapes, vocabulary maps, layer ids, sizes and rope are right; {said}")
    else:
        report.show()
    return report.passed


def _structure(found: layouts.Contents, info: TargetInfo, tokenizer: ChatTokenizer) -> Report:
    subject = Subject(
        found=found,
        target=info,
        highest_token=max(tokenizer.tokenizer.get_vocab().values(), default=0),
        special_ids=tokenizer.special_ids(),
    )
    report = Report(found.folder)
    for name, findings in inspect(subject).items():
        report.add(name, findings, MEANS[name])
    return report


def _cannot_run(settings: CheckSettings, found: layouts.Contents, report: Report) -> str | None:
    """Why the draft cannot be run, or None."""
    if not report.passed:
        return "mend the faults first"
    if beyond(found):
        return f"specforge has no {', '.join(beyond(found))}"
    if settings.features is None and settings.data is None:
        return "give --data or --features: real features are needed"
    return None


def _with_features(
    settings: CheckSettings,
    report: Report,
    found: layouts.Contents,
    info: TargetInfo,
    tokenizer: ChatTokenizer,
    ranks: Ranks,
) -> None:
    """Equal logits and acceptance, on features out of a store or captured now."""
    layers = draft_folder.config_of(found.config, found.folder).aux_layers
    engine = None
    if settings.data or engines.choose(settings.engine) == "sglang":
        own = settings.model_copy(update={"aux_layers": layers})
        engine = start_engine(own, info, ranks, Path("."))
    with watched(ranks, settings.rank_timeout, engine):
        if settings.data:
            assert engine is not None
            records = _captured(settings, engine, tokenizer)
        else:
            records = _stored(settings, report, info, layers, ranks)
        if not records:
            return
        if engine is None:
            report.skip(COMPARED, "the target does not run in SGLang")
        else:
            seen = _compare(report, found, info, engine, records, ranks)
            if isinstance(seen, str):
                report.skip(COMPARED, seen)
        _measure(settings, report, found, info, records, ranks, engine)
        if engine is None:
            report.skip(NEIGHBOURS, "a store holds no other layers")
        else:
            _neighbours(report, found, info, engine, records, ranks)


def _enough(examples: Sequence[Example], positions: int) -> list[Example]:
    """The first examples that hold so many predictions together."""
    held, chosen = 0, list[Example]()
    for example in examples:
        if held < positions:
            held += int((prediction_depth(example.loss_mask) > 0).sum())
            chosen.append(example)
    return chosen


def _captured(settings: CheckSettings, engine: TargetEngine, tokenizer: ChatTokenizer) -> list[FeatureRecord]:
    assert settings.data is not None
    file = settings.data / "test.jsonl" if settings.data.is_dir() else settings.data
    examples = _enough(prepared.load_examples(file, tokenizer, settings, limit=256), settings.positions)
    check_lengths({"test": examples}, settings.tokens_per_batch)
    captured = LiveSource(engine, examples, tp_rank=0).batches([[[at]] for at in range(len(examples))])
    return [record for records in captured for record in records]


def _stored(
    settings: CheckSettings, report: Report, info: TargetInfo, layers: tuple[int, ...], ranks: Ranks
) -> list[FeatureRecord]:
    assert settings.features is not None
    store = Store(settings.features / "test", settings.verify)
    check_target(store, info)
    if store.manifest.aux_layers != layers:
        what = f"the store holds the states of layers {list(store.manifest.aux_layers)}, the draft reads {list(layers)}"
        where = f"{store.folder}/manifest.json, 'aux_layers'"
        fix = "if the draft was trained from this store its layer ids are wrong; else give --data"
        report.skip(COMPARED, "no features")
        report.add(MEASURED, [Finding(what, where, fix)], "no features")
        return []
    held, records = 0, list[FeatureRecord]()
    for index in range(len(store)):
        if held >= settings.positions:
            break
        records.append(store.record(index, ranks.device))
        held += int((prediction_depth(records[-1].loss_mask.numpy()) > 0).sum())
    return records


def _draft(found: layouts.Contents, info: TargetInfo, dtype: torch.dtype, ranks: Ranks) -> Eagle3Draft:
    draft = Eagle3Draft(draft_folder.config_of(found.config, found.folder))
    draft.load_state_dict({name: found.tensors[name] for name in draft.state_dict()})
    return draft.to(ranks.device, dtype).eval()


def _compare(
    report: Report,
    found: layouts.Contents,
    info: TargetInfo,
    engine: TargetEngine,
    records: Sequence[FeatureRecord],
    ranks: Ranks,
) -> Agreement | str:
    """SGLang's class against ours in the target's dtype, or why it cannot be done."""
    judge = engines.judge(engine, found.config, found.tensors)
    if isinstance(judge, str):
        return judge
    draft = _draft(found, info, engine.dtype, ranks)
    embedding_VH = weights.load_head(info, engine.dtype).embedding_VH.to(ranks.device)
    seen = agreement(judge, draft, embedding_VH, records, engine.dtype)
    wrong = list[Finding]()
    if not seen.equal:
        what = f"SGLang's draft class gives other logits than specforge's: {_said(seen)}"
        fix = "report draft and SGLang's version; acceptance when served will not be the measured one"
        wrong.append(Finding(what, str(found.folder), fix))
    report.add(COMPARED, wrong, _said(seen))
    return seen


def _said(seen: Agreement) -> str:
    return (
        f"SGLang's class and ours on {seen.positions:,} positions: largest logit difference {seen.max_difference:.2g}, "
        f"{seen.apart:.1e} of the logits' norm (at most {seen.tolerance:.1e}); same first choice at "
        f"{seen.same_top1 / max(seen.positions, 1):.1%}, {seen.wrong_top1} differ beyond a near-tie"
    )


def _measure(
    settings: CheckSettings,
    report: Report,
    found: layouts.Contents,
    info: TargetInfo,
    records: Sequence[FeatureRecord],
    ranks: Ranks,
    engine: TargetEngine | None,
) -> None:
    dtype = drafting_dtype(info, engine, ranks)
    embedding_VH = weights.load_head(info, dtype).embedding_VH.to(ranks.device)
    batches = [FeatureBatch.pack([record], ranks.device, dtype) for record in records]
    if ranks.rank:
        batches = []  # every rank holds all records: counted once
    seen = teacher_forced(_draft(found, info, dtype, ranks), embedding_VH, _kept(found, ranks), batches, settings.steps)
    said = f"{seen.length:.2f} tokens a pass over {seen.rows[0]:,} predictions, {settings.steps} steps, teacher-forced"
    report.add(MEASURED, _too_low(found, seen, said), said)


def _kept(found: layouts.Contents, ranks: Ranks) -> torch.Tensor:
    ids = torch.arange(found.config["draft_vocab_size"])
    return (found.tensors["d2t"] + ids if "d2t" in found.tensors else ids).to(ranks.device)


def _neighbours(
    report: Report,
    found: layouts.Contents,
    info: TargetInfo,
    engine: TargetEngine,
    records: Sequence[FeatureRecord],
    ranks: Ranks,
) -> None:
    """Feeds the draft the layers one below and one above as well. Ids that are shifted alike for both servers are
    well-formed; they show only here, where the draft understands other layers better than those that it names."""
    named = draft_folder.config_of(found.config, found.folder).aux_layers
    draft, kept_D = _draft(found, info, engine.dtype, ranks), _kept(found, ranks)
    embedding_VH = weights.load_head(info, engine.dtype).embedding_VH.to(ranks.device)

    def nats(seen: Sequence[FeatureRecord]) -> torch.Tensor:
        batches = [FeatureBatch.pack([record], ranks.device, engine.dtype) for record in seen]
        return surprise(draft, embedding_VH, kept_D, batches)

    own_R = nats(records)
    said, wrong = [f"{list(named)} as named: {float(own_R.mean()):.3f} nats a token"], list[Finding]()
    for shift in (-1, 1):
        layers = tuple(layer + shift for layer in named)
        if layers[0] < 0 or layers[-1] > info.num_layers - 2:
            continue
        if not engines.read_layers(engine, layers):
            report.skip(NEIGHBOURS, "this target's layers are read through hooks")
            return
        other_R = nats([replace(record, aux=_recaptured(engine, record)) for record in records])
        said.append(f"{list(layers)}: {float(other_R.mean()):.3f}")
        gain_R = own_R - other_R
        gain, error = float(gain_R.mean()), float(gain_R.std() / max(len(gain_R), 1) ** 0.5)
        if gain > CLEARLY_NATS and gain > CLEARLY_SIGMA * error:
            what = (
                f"the draft understands layers {list(layers)} better than {list(named)}, which it names: by "
                f"{gain:.3f} +- {error:.3f} nats a token; the ids are shifted for both servers alike"
            )
            wrong.append(Finding(what, found.key(layouts.IDS), f"write {list(layers)} for SGLang, one higher for vLLM"))
    engines.read_layers(engine, named)
    report.add(NEIGHBOURS, wrong, "; ".join(said))


def _recaptured(engine: TargetEngine, record: FeatureRecord) -> torch.Tensor:
    tokens, mask = record.token_ids.cpu().numpy(), record.loss_mask.cpu().numpy()
    example = Example(sample_id=record.sample_id, token_ids=tokens, loss_mask=mask)
    return engine.capture([example])[0].aux.clone()


def _too_low(found: layouts.Contents, seen: Acceptance, said: str) -> list[Finding]:
    if not seen.rows[0]:
        what, fix = "the data holds no position to measure on", "give conversations with assistant turns"
        return [Finding(what, "--data", fix)]
    if seen.length >= HARDLY:
        return []
    layers = found.config["eagle_config"][layouts.IDS]
    what = f"hardly anything is accepted: {said}; layers {layers}, {seen.coverage:.0%} of the tokens can be drafted"
    return [Finding(what, str(found.folder), LOOK_FOR)]


def _say_fingerprint(report: Report, found: layouts.Contents, info: TargetInfo, measured: bool) -> None:
    own = (found.config.get("specforge") or {}).get("target_fingerprint", "")
    if own in ("", info.fingerprint):
        return
    fix = "the acceptance says whether it still fits" if measured else "measure whether it still fits: give --data"
    what = "the draft was trained for another target, or for this one before a fine-tune"
    where = found.key("specforge.target_fingerprint")
    report.add("target", [Finding(what, where, fix, fault=not measured)], "another one")


def _end(report: Report, settings: CheckSettings) -> int | None:
    report.show()
    if not report.passed:
        say(f"[bold red]{sum(one.fault for one in report.findings)} fault(s)[/]")
        return 2
    if any(verdict == "not done" for _, verdict, _ in report.rows):
        say("no fault in what was checked; rows marked 'not done' were not")
    else:
        say_serving(settings.folder, settings.model_path, Shape.chain(min(settings.steps, SERVED_STEPS)))
    return None
