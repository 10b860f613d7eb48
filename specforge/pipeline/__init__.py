"""One short function a command: the only place where sibling folders meet. Each returns its exit code (None is 0).

Each command imports what it needs and no more: one that asks a server or looks around starts without torch."""

from __future__ import annotations

from specforge import config


def prepare_data(settings: config.PrepareDataSettings) -> int | None:
    from specforge.pipeline import data

    return data.prepare_data(settings)


def regenerate(settings: config.RegenerateSettings) -> int | None:
    from specforge.pipeline import regeneration

    return regeneration.regenerate(settings)


def prepare_hidden(settings: config.PrepareHiddenSettings) -> int | None:
    from specforge.pipeline import capture

    return capture.prepare_hidden(settings)


def train(settings: config.TrainSettings) -> int | None:
    from specforge.pipeline import training

    return training.train(settings)


def benchmark(settings: config.BenchmarkSettings) -> int | None:
    from specforge.pipeline import proof

    return proof.benchmark(settings)


def plan(settings: config.PlanSettings) -> int | None:
    from specforge.pipeline import plan as planning

    return planning.plan(settings)


def store_verify(settings: config.StoreVerifySettings) -> int | None:
    from specforge.pipeline import stores

    stores.store_verify(settings)
    return None


def store_info(settings: config.StoreInfoSettings) -> int | None:
    from specforge.pipeline import stores

    stores.store_info(settings)
    return None


def store_merge(settings: config.StoreMergeSettings) -> int | None:
    from specforge.pipeline import stores

    stores.store_merge(settings)
    return None


def demo(settings: config.DemoSettings) -> int | None:
    from specforge import demo as demonstration

    demonstration.run(settings)
    return None


def doctor(settings: config.DoctorSettings) -> int | None:
    from specforge import doctor as doctoring

    return doctoring.report()
