"""The losses, attacks and figures that evidence/ answers with, and what is committed there."""

import csv
import functools
import gzip
import itertools
import json
import math
import re
import struct
import sys
from pathlib import Path

import mpmath
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

pytest.importorskip("pyautoattack")

EVIDENCE = Path(__file__).parents[1] / "evidence"
sys.path.insert(0, str(EVIDENCE))
try:
    import attacks
    import comparison
    import data
    import figures
    import losses
    import measures
    import plan
    import report
    import results
    import run
    import training
    from data import Data
    from losses import OURS, Setting
    from measures import Measure
finally:
    sys.path.remove(str(EVIDENCE))

nan = math.nan
SMALL = plan.FULL._replace(
    recipes={"mnist": plan.Recipe(256, 1, 20)},
    losses=("cross entropy", OURS),
    trials=2,
    refined=1,
    seeds=(1, 2),
    given_up=(0.0, plan.MIDDLE),
    usual=losses.USUAL[-1:],
    validated=20,
)


def setting(loss, strength=nan, c=nan, ramp=False, weight_decay=0.01):
    return Setting(loss, strength, c, False, ramp, weight_decay)


def by_hand(loss, z, g, strength):
    """The formula of a row, at 50 digits."""
    K = len(z)
    total = mpmath.fsum(map(mpmath.exp, z))
    p = [mpmath.exp(z_j) / total for z_j in z]
    q = [p[j] / (1 - p[g]) for j in range(K) if j != g]
    among_wrong = -mpmath.fsum(q_j * mpmath.log(q_j) for q_j in q)
    wrong = [p[j] for j in range(K) if j != g]
    h = -mpmath.log(p[g])
    coin = [p_j / (p_j + mpmath.mpf("1e-3")) for p_j in wrong]
    return {
        "cross entropy": h,
        "label smoothing": (1 - strength) * h - strength * mpmath.fsum(map(mpmath.log, p)) / K,
        "focal loss": (1 - p[g]) ** strength * h,
        "confidence penalty": h + strength * mpmath.fsum(p_j * mpmath.log(p_j) for p_j in p),
        "complement cross entropy": h - strength / (K - 1) * among_wrong,
        "guided complement entropy": -(p[g] ** strength) * among_wrong / mpmath.log(K - 1),
        OURS: h + strength * mpmath.fsum(s * mpmath.log(s) + (1 - s) * mpmath.log(1 - s) for s in coin),
    }[loss]


@pytest.mark.parametrize("strength", [0.3, 0.9])
@pytest.mark.parametrize("loss", losses.SPACES)
def test_losses_are_their_formulas(loss, strength):
    mpmath.mp.dps = 50
    z = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    made = losses.loss_of(setting(loss, strength, 1e-3), 1.0)(z, labels).item()
    expected = sum(
        by_hand(loss, list(map(mpmath.mpf, row)), g, strength)
        for row, g in zip(z.tolist(), labels.tolist(), strict=True)
    )
    assert made == pytest.approx(float(expected / 6), rel=1e-12)


@pytest.mark.parametrize("loss", losses.SPACES)
def test_losses_have_finite_gradients_where_a_row_is_certain(loss):
    z = torch.tensor([[200.0, 0, 0], [0, 200.0, 0], [0.0, 0, 0]], requires_grad=True)
    losses.loss_of(setting(loss, 0.3, 1e-3), 1.0)(z, torch.tensor([0, 0, 1])).backward()
    assert z.grad.isfinite().all()


def test_a_ramp_grows_through_half_of_the_training():
    z, labels = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    whole, ramp = setting(OURS, 2.0, 1e-3), setting(OURS, 2.0, 1e-3, ramp=True)
    for progress, share in ((0, 0), (0.25, 0.5), (0.5, 1), (0.9, 1)):
        expected = losses.loss_of(whole._replace(strength=2.0 * share), progress)(z, labels)
        assert losses.loss_of(ramp, progress)(z, labels).item() == expected.item()


def test_draws_cover_their_limits_evenly():
    for loss in losses.SPACES:
        box = losses.whole_box(loss)
        drawn = losses.draw(loss, 24, box, 0)
        assert len(set(map(str, drawn))) == 24
        assert list(map(str, drawn)) == list(map(str, losses.draw(loss, 24, box, 0)))
        for column, (low, high) in box._asdict().items():
            values = np.log([getattr(one, column) for one in drawn])
            if math.isnan(low):
                assert np.isnan(values).all()
                continue
            places = (values - np.log(low)) / np.log(high / low)
            assert set((places * 4).astype(int)) == {0, 1, 2, 3}
            assert places.min() >= -0.01
            assert places.max() <= 1.01
        assert {one.ramp for one in drawn} == ({False, True} if loss == OURS else {False})


def test_a_second_search_stays_around_the_first():
    found = [setting(OURS, strength, c, weight_decay=decay) for strength, c, decay in ((0.1, 1e-3, 1), (0.4, 1e-2, 2))]
    box = losses.narrowed(OURS, found)
    assert box.strength == pytest.approx((0.05, 0.8))
    assert box.c == pytest.approx((1e-3 / 10**0.5, 1e-2 * 10**0.5))
    assert box.weight_decay == pytest.approx((0.5, 4))
    alone = losses.narrowed("label smoothing", [setting("label smoothing", 0.6)])
    assert alone.strength == pytest.approx((0.3, 0.9))  # no further than the whole space
    assert np.isnan(alone.c).all()


def test_an_idx_file_is_read(tmp_path):
    content = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(bytes([0, 0, 8, 3]) + struct.pack(">iii", 2, 3, 4) + content.tobytes()))
    assert data.read_idx(path).tolist() == content.tolist()


def test_a_folder_without_the_files_is_an_error_that_names_them(tmp_path):
    with pytest.raises(SystemExit, match=r"lacks files.*train-images-idx3-ubyte\.gz.*"):
        data.find_fashion(tmp_path)


def test_mnist_is_split_evenly_into_sets_without_a_common_image():
    sets = data.load("mnist")
    assert [len(part.labels) for part in sets] == [3000, 1000, 1000]
    for part in sets:
        assert torch.bincount(part.labels).unique().tolist() == [len(part.labels) // 10]
        assert (part.images.min(), part.images.max()) == (0, 1)
    images = torch.cat([part.images for part in sets]).flatten(1)
    assert len(images.unique(dim=0)) == 5000


def test_wrong_labels_are_other_labels():
    labels = torch.arange(10).repeat(2000)
    wrong = data.with_wrong_labels(labels, 0.4, seed=3)
    assert (wrong != labels).double().mean().item() == pytest.approx(0.4, abs=0.02)
    counts = torch.bincount((wrong - labels) % 10, minlength=10)[1:]
    assert (counts - counts.double().mean()).abs().max() < 5 * counts.double().mean().sqrt()
    assert data.with_wrong_labels(labels, 0.4, seed=3).equal(wrong)


@pytest.mark.parametrize("name", data.CORRUPTIONS)
def test_corruptions_are_the_same_at_every_call_and_leave_images(name):
    images = data.load("mnist").test.images[:20]
    corrupted = data.CORRUPTIONS[name](images)
    assert corrupted.equal(data.CORRUPTIONS[name](images))
    assert corrupted.shape == images.shape
    assert corrupted.min() >= 0
    assert corrupted.max() <= 1
    assert 0.01 < (corrupted - images).abs().mean() < 0.3


@pytest.fixture
def linear():
    """Two classes told apart by a line: the worst image within epsilon is known."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 2, bias=False))
    generator = torch.Generator().manual_seed(0)
    model[1].weight.data = torch.randn(2, 784, generator=generator) / 50  # else cross entropy has no gradient left
    images = 0.3 + 0.4 * torch.rand(60, 1, 28, 28, generator=generator)
    with torch.no_grad():
        labels = model(images).argmax(1)
    return model.requires_grad_(False), Data(images, labels)


@pytest.mark.parametrize("attack", ["fgsm", "pgd"])
def test_attacks_find_the_worst_image_of_a_line(attack, linear):
    model, given = linear
    normal = model[1].weight[0] - model[1].weight[1]
    margin = (given.images.flatten(1) @ normal).abs()
    epsilon = (margin / normal.abs().sum()).median().item()
    if attack == "fgsm":
        images = attacks.fgsm(model, given, epsilon)
        kept = attacks.is_right(model, given._replace(images=images))
    else:
        images = attacks.pgd(model, given, epsilon, 20, generator=torch.Generator().manual_seed(0))
        kept = attacks.withstands_pgd(model, given, epsilon, 20, restarts=2)
    assert (images - given.images).abs().max() <= epsilon * (1 + 1e-5)
    worst = margin - epsilon * normal.abs().sum()
    assert kept[worst.abs() > 1e-3].equal((worst > 0)[worst.abs() > 1e-3])


def test_autoattack_is_no_weaker_than_pgd(linear):
    model, given = linear
    model[1].weight.data = torch.randn(10, 784, generator=torch.Generator().manual_seed(1)) / 50
    given = given._replace(labels=model(given.images).argmax(1)).first(10)
    epsilon = 0.004
    names, left = zip(*attacks.autoattack(model, given, epsilon), strict=True)
    assert names == attacks.ATTACKS
    for before, after in itertools.pairwise(left):
        assert (after <= before).all()
    assert (left[-1] <= attacks.withstands_pgd(model, given, epsilon, 20)).all()
    assert any(attacks.withstands_pgd(model, given, epsilon / 100, 5))


def test_a_temperature_undoes_a_scale():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20000, 5, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    assert measures.temperature_of(3 * logits, labels) == pytest.approx(3, rel=0.03)
    (_, nll, *_), (_, ece, *_) = measures.calibration(3 * logits, labels, 3, "_scaled")
    assert nll == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-6)
    assert ece < 0.02 < next(m.value for m in measures.calibration(3 * logits, labels, 1, "") if m.measure == "ece")


def test_reliability_and_wrong_probabilities_are_those_of_a_known_table():
    logits = torch.tensor([[0.7, 0.2, 0.1]] * 10, dtype=torch.float64).log()
    labels = torch.tensor([0] * 7 + [1] * 2 + [2])
    accuracy, confidence = measures.reliability(logits, labels)
    assert (accuracy.value, confidence.value, accuracy.count) == pytest.approx((0.7, 0.7, 10))
    quantiles = {m.level: m.value for m in measures.wrong_probabilities(logits, labels)}
    assert quantiles[0] == pytest.approx(-1)
    assert quantiles[1.0] == pytest.approx(math.log10(0.7))
    assert quantiles[0.5] == pytest.approx(math.log10(0.2))


def test_known_and_unknown_are_told_apart():
    sure, unsure = torch.tensor([[9.0, 0, 0]] * 5), torch.tensor([[1.0, 0.5, 0]] * 5)
    assert [m.value for m in measures.out_of_distribution(sure, unsure)] == [1.0, 1.0]
    assert [m.value for m in measures.out_of_distribution(unsure, sure)] == [0.0, 0.0]
    assert [m.value for m in measures.out_of_distribution(sure, sure)] == [0.5, 0.5]


def test_the_hull_of_a_front():
    clean, robust = np.array([0.9, 0.8, 0.85]), np.array([0.2, 0.6, 0.1])
    found = [comparison.envelope(clean, robust, level).item() for level in (0.95, 0.9, 0.85, 0.8, 0.7)]
    assert found == pytest.approx([nan, 0.2, 0.4, 0.6, 0.6], nan_ok=True)


def lines(run_, measures_, group="test", stage="fronts", folder=None):
    ended = [*measures_, Measure("seconds", 1.0, 1)]
    results.append(folder / f"{stage}.csv", run_, group, ended, "0" * 8, ("", "", "", ""))


def test_bits_are_read_as_they_were_written():
    flags = torch.rand(501, generator=torch.Generator().manual_seed(0)) < 0.3
    measure = measures.share("clean", flags, keep=True)
    table = pd.DataFrame(
        [setting(OURS, 1.0, 1e-3)._asdict() | {"seed": 3, "measure": "clean", "kept": measure.kept, "count": 501}]
    )
    (seed, read), *others = comparison.images(table, setting(OURS, 1.0, 1e-3), "clean").items()
    assert (seed, others) == (3, [])
    assert read.tolist() == flags.tolist()


@pytest.fixture
def two_fronts(tmp_path):
    """Two losses of one setting each: ours keeps a twentieth of the images more, of which others are lost by seed."""
    generator = torch.Generator().manual_seed(0)
    settings = setting("cross entropy"), setting(OURS, 1.0, 1e-3)
    clean = torch.rand(1000, generator=generator) < 0.9
    kept = torch.rand(500, generator=generator) < 0.5
    more = kept | (torch.rand(500, generator=generator) < 0.1)
    for seed in range(1, 6):
        for one, of_loss in zip(settings, (kept, more), strict=True):
            left = of_loss & (torch.rand(500, generator=generator) < 0.99)
            of_seed = plan.run_of(plan.FULL, "mnist", one, seed)
            others = [measures.share(name, left | True, 0.1, keep=True) for name in comparison.STRONG[1:]]
            lines(of_seed, [measures.share("clean", clean, keep=True), *others], folder=tmp_path)
            lines(of_seed, [measures.share("after_square", left, 0.1, keep=True)], "autoattack", folder=tmp_path)
    table = results.read(tmp_path, "fronts")
    return [comparison.Front(table, [one], 0.1) for one in settings], (more & ~kept).double().mean().item()


def test_differences_are_paired_by_seed_and_by_image(two_fronts):
    (rival, ours), gain = two_fronts
    mean, half = comparison.difference(ours, rival, 0.85)
    assert mean == pytest.approx(gain, abs=0.01)
    # Of images that both keep or both lose there is no variance; Student's factor of five seeds is 2.776.
    of_images = 2.776 * math.sqrt(gain * (1 - gain) / 500)
    assert 0.9 * of_images < half < of_images + 0.02
    assert report.verdict(ours, rival, 0.85).endswith("ahead")
    assert report.verdict(rival, ours, 0.85).endswith("behind")
    assert report.verdict(ours, ours, 0.85) == "+0.000 ± 0.000 no difference"
    assert report.verdict(ours, rival, 0.99) == "not reached by this loss"


def test_an_image_is_robust_if_it_withstands_every_attack(two_fronts, tmp_path):
    table = results.read(tmp_path, "fronts")
    every_second = torch.arange(500) % 2 == 0
    table.loc[table.measure == "transfer", "kept"] = measures.bits(every_second)
    (rival, _), _ = two_fronts
    left = comparison.Front(table, [setting("cross entropy")], 0.1).robust
    assert (left == rival.robust * every_second.double().numpy()).all()


def test_gains_are_paired_by_seed_and_by_image():
    kept = {1: [1, 1, 0, 0], 2: [1, 1, 1, 0], 3: [1, 0, 0, 0]}
    ours = {seed: np.array(flags, float) for seed, flags in kept.items()}
    rival = {1: np.array([1.0, 0, 0, 0]), 2: np.array([1.0, 1, 0, 0]), 4: np.array([1.0, 1, 1, 1])}
    mean, half = comparison.paired(ours, rival)  # of each image: (0, 1, 0, 0), then (0, 0, 1, 0)
    assert mean == 0.25
    assert half == pytest.approx(12.706 * math.sqrt(0 / 2 + (1 / 12) / 4), rel=1e-4)
    assert comparison.paired(ours, ours) == (0, 0)
    assert math.isnan(comparison.paired(ours, {1: ours[1]})[0])
    mean, half = comparison.paired({1: np.array([0.3]), 2: np.array([0.1])}, {1: np.array([0.1]), 2: np.array([0.3])})
    assert (mean, half) == (pytest.approx(0), pytest.approx(12.706 * 0.2, rel=1e-4))
    assert report.gain({1: np.array([0.3]), 2: np.array([0.31])}, {1: np.array([0.0]), 2: np.array([0.0])}).startswith(
        "**+0.3"
    )


def test_a_table_of_gains_leaves_out_what_nobody_measured(two_fronts, tmp_path):
    (rival, ours), gained = two_fronts
    table = results.read(tmp_path, "fronts")
    settings = {"cross entropy": setting("cross entropy"), OURS: setting(OURS, 1.0, 1e-3)}
    choice = {(loss, given_up): of for given_up in (0.0, 0.015) for loss, of in settings.items()}
    choice["cross entropy", 0.015] = setting("cross entropy", weight_decay=3.0)
    columns = [("robust", functools.partial(comparison.robust, epsilon=0.1))]
    header, _, *rows = report.gains(columns, table, choice).splitlines()
    assert header == "| this loss less | chosen for | robust |"
    (row,) = rows
    mean = (ours.robust - rival.robust).mean()
    assert row.startswith(f"| cross entropy | accuracy | **{mean:+.3f} ± ")
    assert mean == pytest.approx(gained, abs=0.01)


def test_what_to_take_is_held_against_the_most_accurate_and_against_the_same_goal(two_fronts, tmp_path, monkeypatch):
    (rival, ours), _ = two_fronts
    table = results.read(tmp_path, "fronts").replace({"epsilon": {0.1: 0.2}})
    monkeypatch.setattr(report, "EPSILONS", dict.fromkeys(measures.EPSILONS, (0.1, 0.2)))
    less, more = setting("cross entropy"), setting(OURS, 1.0, 1e-3)
    choice = {("cross entropy", 0.0): less, (OURS, 0.0): less, ("cross entropy", 0.015): more, (OURS, 0.015): more}
    monkeypatch.setattr(plan, "chosen", lambda *_: choice)
    monkeypatch.setattr(plan, "lines_of", lambda stages, *_: table if stages != ["likelihood"] else table.head(0))
    accurate, robust = report.take(tmp_path, SMALL).splitlines()[2:]
    none = "+0.000 ± 0.000"
    gained = f"**{(ours.robust - rival.robust).mean():+.3f} ± "
    assert accurate.split(" | ")[8:] == [none, none, none, f"{none} |"]
    assert robust.split(" | ")[3:5] == ["1", "0.001"]
    clean, of_accurate, of_goal, of_other = robust.split(" | ")[8:]
    assert (clean, of_goal, of_other) == (none, none, f"{none} |")
    assert of_accurate.startswith(gained)


def test_a_front_without_autoattack_has_no_seeds(two_fronts, tmp_path):
    table = results.read(tmp_path, "fronts")
    front = comparison.Front(table[table.group == "test"], [setting("cross entropy")], 0.1)
    assert front.seeds == []
    assert report.verdict(front, front, 0.85) == "not measured"


def test_files_survive_a_kill_in_the_middle_of_a_line(tmp_path):
    path = tmp_path / "fronts.csv"
    first, second = (plan.run_of(plan.FULL, "mnist", setting(OURS, 0.3, 1e-3), seed) for seed in (1, 2))
    lines(first, [Measure("clean", 0.9, 1000)], folder=tmp_path)
    whole = path.read_text()
    lines(second, [Measure("clean", 0.91, 1000)], folder=tmp_path)
    both = path.read_text()
    header = whole.index("\n") + 1
    for cut in range(len(both)):
        path.write_text(both[:cut])
        results.repair(path)
        assert path.read_text() == ("" if cut < header else both[:header] if cut < len(whole) else whole)
        if cut < len(whole):
            lines(first, [Measure("clean", 0.9, 1000)], folder=tmp_path)
        assert results.finished(tmp_path) == {results.key_of(first, "test")}
        lines(second, [Measure("clean", 0.91, 1000)], folder=tmp_path)
        assert path.read_text() == both
    assert results.finished(tmp_path) == {results.key_of(one, "test") for one in (first, second)}
    tasks = [plan.Task(one, ("test", "autoattack")) for one in (first, second._replace(seed=3))]
    assert [task.groups for task in run.missing(tasks, tmp_path)] == [("autoattack",), ("test", "autoattack")]


def test_measured_twice_counts_once(tmp_path):
    one = plan.run_of(plan.FULL, "mnist", setting(OURS, 0.3, 1e-3), 1)
    for value in (0.9, 0.8):
        lines(one, [Measure("clean", value, 1000), Measure("ece", value, 1000)], folder=tmp_path)
    lines(one, [Measure("after_square", 0.5, 500, 0.1)], "autoattack", folder=tmp_path)
    table = results.read(tmp_path)
    assert table.measure.tolist() == ["clean", "ece", "seconds", "after_square", "seconds"]
    assert comparison.values(table, setting(OURS, 0.3, 1e-3), "clean").tolist() == [0.9]


def test_a_setting_is_chosen_for_its_robustness_at_the_accuracy_that_may_be_given_up(tmp_path):
    size = SMALL._replace(losses=("cross entropy", OURS), given_up=(0.0, 0.01, 0.1), trials=3, refined=0)
    found = {
        "cross entropy": [(0.90, 0.3), (0.895, 0.4), (0.85, 0.5)],
        OURS: [(0.88, 0.4), (0.84, 0.6), (0.7, 0.9)],
    }
    with pytest.raises(plan.SearchMissingError, match="--stages search"):
        plan.chosen(tmp_path, size, "mnist")
    drawn = {loss: losses.draw(loss, 3, losses.whole_box(loss), 0) for loss in found}
    for loss, trials in found.items():
        for one, (clean, pgd) in zip(drawn[loss], trials, strict=True):
            of_trial = plan.run_of(size, "mnist", one, plan.SEARCH_SEED)
            both = [Measure("pgd", pgd - 0.1, 100, 0.1), Measure("pgd", pgd + 0.1, 100, 0.2)]
            lines(of_trial, [Measure("clean", clean, 100), *both], "validation", "search", tmp_path)
    choice = plan.chosen(tmp_path, size, "mnist")
    which = {key: [one.weight_decay for one in drawn[key[0]]].index(of.weight_decay) for key, of in choice.items()}
    assert which == {
        ("cross entropy", 0.0): 0,
        ("cross entropy", 0.01): 1,
        ("cross entropy", 0.1): 2,
        (OURS, 0.0): 0,
        (OURS, 0.01): 0,  # reached by none, so the most accurate one
        (OURS, 0.1): 1,
    }
    size = size._replace(refined=2)
    with pytest.raises(plan.SearchMissingError, match="refine"):
        plan.chosen(tmp_path, size, "mnist")
    refined = [task.run.setting for task in plan.refine(size, "mnist", tmp_path)]
    assert [one.loss for one in refined] == ["cross entropy", OURS] * 2
    # Around the first of ours alone: the others are less accurate by more than is worth refining, or just by it.
    box = losses.narrowed(OURS, drawn[OURS][:2])
    assert all(box.strength[0] * 0.99 <= one.strength <= box.strength[1] * 1.01 for one in refined if one.loss == OURS)


def test_the_same_run_gives_the_same_weights_and_another_seed_others():
    few = data.load("mnist").train
    first = plan.run_of(SMALL, "mnist", setting(OURS, 0.3, 1e-2), 1)
    sums = [training.checksum(training.train(one, few)) for one in (first, first, first._replace(seed=2))]
    assert sums[0] == sums[1] != sums[2]


@pytest.mark.parametrize("changes", [{"model": "residual"}, {"training": "pgd", "train_epsilon": 0.1}], ids=str)
def test_other_trainings_learn_too(changes):
    sets = data.load("mnist")
    of_change = plan.run_of(SMALL, "mnist", setting(OURS, 0.1, 1e-2), 1, **changes)._replace(examples=1024, epochs=8)
    model = training.train(of_change, sets.train)
    assert not model.training
    assert attacks.is_right(model, sets.test).double().mean() > 0.25


def test_the_whole_way_from_a_search_to_a_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measures, "FEW", 10)
    monkeypatch.setattr(attacks, "ATTACKS", ("apgd-ce", "square"))  # the other two take a minute
    monkeypatch.setattr(data, "find_fashion", lambda folder: None)
    for stage in ("search", "refine", "fronts"):
        for task in run.missing(plan.tasks(SMALL, stage, "mnist", tmp_path), tmp_path):
            done, weights, groups = run.work(task, SMALL, None)
            for group, found in groups.items():
                results.append(tmp_path / f"{stage}.csv", done.run, group, found, weights, ("", "", "", ""))
        assert run.missing(plan.tasks(SMALL, stage, "mnist", tmp_path), tmp_path) == []
    table = plan.lines_of(["fronts"], tmp_path, SMALL, "mnist")
    assert set(table.group) == {"test", "autoattack"}
    assert table[table.measure.isin(["clean", "pgd", "transfer", "ece"])].value.between(0, 1).all()
    report.main(tmp_path, SMALL)
    out = capsys.readouterr().out
    assert f"{OURS} | λ = 1, c = 1e-07, decay 0.01" in out
    assert re.search(r"^\| cross entropy \|( [^|]+ \|){6}$", out, re.MULTILINE)  # two epsilons, three levels
    take = [row.split(" | ") for row in out.splitlines() if row.startswith("| 10 | mnist | ")]
    assert [row[2] for row in take] == ["accuracy", "robustness for 1.5 points"]
    wanted = plan.chosen(tmp_path, SMALL, "mnist")[OURS, 0.0]
    assert take[0][3:5] == [f"{wanted.strength:.2g}", f"{wanted.c:.1g}"]
    assert all(re.fullmatch(r"\**[+-]\d\.\d{3} ± \d\.\d{3}\**", cell) for cell in take[0][8:11])
    for name in ("search", "fronts", "probabilities"):
        assert (tmp_path / f"{name}_mnist.png").read_bytes().startswith(b"\x89PNG")
    fronts = json.loads((tmp_path / "fronts_mnist.json").read_text())
    verdicts = table[(table.measure == "after_square") & (table.weight_decay != 0.01)].groupby("epsilon").value
    for eps, found in verdicts:
        assert max(point["robust"] for point in fronts if point["epsilon"] == eps) <= found.max()


def test_what_is_committed_is_what_the_files_give():
    folder = results.RESULTS
    page = report.PAGE.read_text()
    assert report.fill(page, report.tables(folder, plan.FULL)) == page
    places = re.findall("<!-- table: (.*) -->", page)
    of_data = [f"{name}, {data}" for name, (stages, _) in report.TABLES.items() for data in plan.STAGES[stages[0]]]
    assert sorted(places) == sorted(["progress", "take", *of_data])
    shown = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert figures.all_points(folder, plan.FULL) == shown
    for path in folder.glob("*.csv"):
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            assert tuple(reader.fieldnames) == results.COLUMNS
            assert list(reader)[-1]["measure"] == results.LAST
