"""A draft folder from one layout to another."""

from __future__ import annotations

from specforge.config import ExportSettings
from specforge.console import say
from specforge.draft import inspection, layouts
from specforge.errors import CheckpointError, ConfigError
from specforge.pipeline.shared import refuse_foreign
from specforge.target import weights


def export(settings: ExportSettings) -> None:
    """Reads any layout, writes the one asked for; the bits of the tensors stay as they are. A folder whose tensors are
    not those of a draft is refused, and so is what the new layout could not say."""
    if settings.output.resolve() == settings.folder.resolve():
        raise ConfigError(
            "the draft would replace itself", where=f"--output {settings.output}", fix="name a new folder"
        )
    refuse_foreign(settings.output)
    if settings.to == "vllm" and settings.model_path is None:
        raise ConfigError(
            "the speculators format names its target", where="--model-path", fix="give the target's folder or hub name"
        )
    target = None
    if settings.model_path:
        target = weights.describe(settings.model_path, settings.trust_remote_code, fingerprinted=False)
    found = layouts.read(settings.folder)
    if target and not found.names_layers:
        found = layouts.with_layers(found, weights.default_aux_layers(target.num_layers))
    _refuse(found)
    layouts.write(found, settings.to, settings.output, target, settings.model_path)
    say(f"{settings.output}: the draft in the layout of {settings.to}, its tensors bit for bit")
    if settings.to == "safeailab" and target is None:
        say(
            f"[yellow]note[/] the EAGLE repository always reads the default layers; this draft was trained on "
            f"{found.config['eagle_config'][layouts.IDS]}: give --model-path to have that compared"
        )
    say(f"check it: specforge check {settings.output} --model-path {settings.model_path or 'TARGET'} --data DATA")


def _refuse(found: layouts.Contents) -> None:
    """What no layout can mend. The rest is for `specforge check`, which knows the target."""
    faults = [finding for of_one in inspection.of_folder(found).values() for finding in of_one if finding.fault]
    if faults:
        more = f" (and {len(faults) - 1} more: `specforge check` lists them)" if len(faults) > 1 else ""
        raise CheckpointError(faults[0].what + more, where=faults[0].where, fix=faults[0].fix)
    lost = inspection.beyond(found)
    if lost:
        raise CheckpointError(
            f"the draft asks for {', '.join(lost)}, which would be lost on the way",
            where=found.key(lost[0]),
            fix="use it in the layout that it has",
        )
    if not found.names_layers:
        raise CheckpointError(
            "the draft names no aux layers: it was trained on its target's default ones, which must be written in",
            where=found.key(layouts.IDS),
            fix="give the target with --model-path",
        )
