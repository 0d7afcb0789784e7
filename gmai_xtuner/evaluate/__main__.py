# SPDX-License-Identifier: Apache-2.0

"""``python -m gmai_xtuner.evaluate MODEL --benchmark NAME --data PATH``: ask, score and tabulate.

Other verbs: ``compare RUN_A RUN_B``, ``reconcile RUN ...``, ``export RUN``, ``protocols``. A benchmark that
can't be read, asked or scored does not stop the others.

Exit status: 0 if every question that was to be asked has an answer and a score; 1 if not, or if it
failed; 2 if the command line can't be understood; 3 if more answers than ``--max-unread`` allows were cut,
empty, refused or not understood; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TextIO

from gmai_xtuner.cli import (
    add_allow_pickle,
    add_api_key_argument,
    add_dtype_argument,
    only_the_report_on_stdout,
    positive_int,
)
from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.evaluate import compare, runner
from gmai_xtuner.evaluate.answerers import Answerer, ModelOptions, World, make_answerer, world
from gmai_xtuner.evaluate.benchmarks import NAMES, BenchmarkError, built_in, is_own, survey
from gmai_xtuner.evaluate.export import FORMATS, export
from gmai_xtuner.evaluate.protocols import MAX_NEW_TOKENS
from gmai_xtuner.evaluate.results import Result, as_json
from gmai_xtuner.evaluate.tables import to_markdown, write_tables

PROGRAM = "python -m gmai_xtuner.evaluate"
_KEPT = "Answers given so far are kept: the same command goes on."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    with only_the_report_on_stdout() as stdout:
        try:
            if verb := _VERBS.get(next(iter(arguments), "")):
                return verb(arguments[1:], stdout)
            return _evaluate(arguments, stdout)
        except (GMAIError, OSError) as error:
            more = f". {_KEPT}" if isinstance(error, OSError) else ""
            print(f"{PROGRAM}: {error}{more}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print(f"\nStopped. {_KEPT}", file=sys.stderr)
            return 130


def _evaluate(arguments: Sequence[str], stdout: TextIO) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    _check(parser, options)
    options.logprobs = options.controls
    model = ModelOptions(**{one.name: getattr(options, one.name) for one in fields(ModelOptions)})
    out: Path = options.out or Path("work_dirs") / "evaluation" / model.shown
    options.out = out
    how = runner.Options(**{one.name: getattr(options, one.name) for one in fields(runner.Options)})
    results: list[Result] = []
    failures: list[str] = []
    with world() as processes:
        # Every benchmark that can be asked and scored, before a model is loaded.
        prepared: list[runner.Prepared] = []
        needs = not (options.score_only or options.answers)
        for target in _targets(options, failures):
            try:
                prepared.append(
                    runner.prepare(target, how, require_images=needs, rank=processes.rank)
                )
            except GMAIError as error:
                failures.append(str(error))
        if prepared:
            rank = processes.local_rank
            asks = not options.score_only
            answerer = make_answerer(model, cache=out, local_rank=rank) if asks else None
            results = _run(prepared, answerer, how, processes, _judge(options), failures)
        return 0 if processes.rank else _report(options, results, failures, stdout)


def _run(
    prepared: Sequence[runner.Prepared],
    answerer: Answerer | None,
    options: runner.Options,
    processes: World,
    judge: Answerer | None,
    failures: list[str],
) -> list[Result]:
    """Ask and score; a benchmark that can't be is added to the failures and does not stop the others."""
    results: list[Result] = []
    for one in prepared:
        try:
            answers = runner.ask(one, answerer, options, world=processes)
        except GMAIError as error:
            if processes.rank:
                raise
            failures.append(str(error))
            if processes.size > 1:
                break  # the others may wait within this benchmark: they end with this process
            continue
        try:
            results += runner.score(one, answers, options, world=processes, judge=judge)
        except GMAIError as error:
            failures.append(str(error))
    return results


def _report(
    options: argparse.Namespace, results: Sequence[Result], failures: Sequence[str], stdout: TextIO
) -> int:
    """Write the tables, and failures to standard error; return the exit status."""
    tables, out = runner.all_tables(results) if results else [], options.out
    if results:
        write_tables(out, tables)
    complete = not failures and all(result.complete for result in results)
    if options.json:
        found = [as_json(result) for result in results]
        summary = {"out": str(out), "complete": complete, "failures": failures, "results": found}
        stdout.write(json.dumps(summary, ensure_ascii=False) + "\n")
    elif results:
        stdout.write(to_markdown(tables) + f"\nAnswers, tables and pages: {out}\n")
    for failure in failures:
        print(f"{PROGRAM}: {failure}", file=sys.stderr)
    own: dict[tuple[str, str, str], Result] = {}
    for result in results:  # the first is by the protocol's own scorer
        own.setdefault((result.benchmark, result.variant, result.protocol), result)
    unread = [one for one in own.values() if one.unread_share > options.max_unread]
    for result in unread:
        told = (
            f"{100 * result.unread_share:.1f} % of the answers were cut, empty, refused or not understood, "
            f"more than --max-unread allows: the score says little. {'; '.join(result.unread)}"
        )
        about = f"{result.benchmark} {result.variant} {result.protocol}"
        print(f"{PROGRAM}: {about}: {told}", file=sys.stderr)
    return 1 if failures else 3 if unread else 0 if complete else 1


def _targets(options: argparse.Namespace, failures: list[str]) -> list[runner.Target]:
    """Return what is asked; of a folder all that lies there, and add what can't be asked to the failures."""
    if options.benchmark != runner.ALL:
        return [runner.Target(options.benchmark, options.data, options.variant)]
    found = survey(options.data)
    for note in found.notes:
        logging.warning("%s", note)
    if not found.benchmarks:
        raise BenchmarkError(
            f"no benchmark found under {options.data}. Known are {', '.join(NAMES)}, in the files their "
            f"authors ship, and your own with a column map. {' '.join(found.faults[:3])}".rstrip()
        )
    failures += found.faults
    return list(found.benchmarks)


def _judge(options: argparse.Namespace) -> Answerer | None:
    if options.judge is None:
        return None
    requests = {name: getattr(options, name) for name in ("in_flight", "retries", "timeout")}
    key, name = options.judge_api_key_env, options.judge_model
    judge = ModelOptions(name, name, endpoint=options.judge, api_key_env=key, **requests)
    return make_answerer(judge, cache=options.out)


def _compare(arguments: Sequence[str], stdout: TextIO) -> int:
    parser = _verb("compare", "Is one run better than another, or is it chance?")
    add = parser.add_argument
    add("first", type=Path, metavar="RUN_A", help="the --out of a run, or a result in it")
    add("second", type=Path, metavar="RUN_B")
    add("--common", action="store_true", help="compare the questions that both have scored")
    add("--json", action="store_true", help="one JSON list on standard output")
    options = parser.parse_args(arguments)
    found = compare.compare_runs(options.first, options.second, common=options.common)
    text = json.dumps(compare.as_json(found), ensure_ascii=False) + "\n"
    stdout.write(text if options.json else compare.as_text(found))
    return 0


def _reconcile(arguments: Sequence[str], stdout: TextIO) -> int:
    parser = _verb("reconcile", "Split the differences between scores into their causes.")
    runs = "the --out of one or several runs; all is compared with the first score of its benchmark"
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help=runs)
    parser.add_argument("--json", action="store_true", help="one JSON list on standard output")
    options = parser.parse_args(arguments)
    found = compare.reconcile(options.runs)
    text = json.dumps(compare.differences_as_json(found), ensure_ascii=False) + "\n"
    stdout.write(text if options.json else to_markdown([compare.table_of(found)]))
    return 0


def _export(arguments: Sequence[str], stdout: TextIO) -> int:
    parser = _verb("export", "Write a result in a format of the hub or of another kit.")
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="the folder of a result, or a run that has one")
    add("--format", dest="how", required=True, choices=[*FORMATS])
    add("--out", type=Path, metavar="FILE", help="default: in the result's folder")
    add("--dataset", metavar="ID", help="eval_results: the benchmark's repository on the hub")
    add("--task", default="", metavar="ID", help="eval_results: its task there (default: default)")
    options = vars(parser.parse_args(arguments))
    stdout.write(f"{export(options.pop('run'), options.pop('how'), **options)}\n")
    return 0


def _verb(name: str, about: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(allow_abbrev=False, prog=f"{PROGRAM} {name}", description=about)


def _list_protocols(_: Sequence[str], stdout: TextIO) -> int:
    for one in (one for found in built_in().values() for one in found.asked()):
        n = "" if one.expected is None else f", n = {one.expected:,}"
        also = f" (also {', '.join(one.also)})" if one.also else ""
        about = (
            f"{one.benchmark} {one.variant}: {one.name}/{one.version}{n}, scorer {one.scorer}{also}"
        )
        stdout.write(f"{about}. {one.description}\n")
    return 0


_VERBS = {
    "compare": _compare,
    "reconcile": _reconcile,
    "export": _export,
    "protocols": _list_protocols,
}


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.variant is not None:
        if options.benchmark == runner.ALL:
            parser.error("--variant needs one --benchmark")
        found = built_in().get(options.benchmark)
        if found and options.variant not in found.variants:
            known = ", ".join(found.variants)
            parser.error(f"--variant {options.variant}: {options.benchmark} has {known}")
    if options.data is None and not is_own(options.benchmark):
        parser.error(
            f"--benchmark {options.benchmark} needs --data, the folder or file of its questions"
        )
    if options.benchmark == runner.ALL and options.protocols not in ((), [runner.ALL]):
        parser.error("--benchmark all takes each benchmark's default protocols, or --protocol all")
    if (options.judge is None) != (options.judge_model is None):
        parser.error("--judge and --judge-model belong together")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog=PROGRAM,
        description="Ask a model the questions of a benchmark and score its answers by a written protocol. "
        "Other verbs: compare RUN_A RUN_B; reconcile RUN ...; export RUN; protocols.",
    )
    add = parser.add_argument
    models = "an export, a transformers model (folder or hub name), or a name at --endpoint"
    add("model", help=models)
    own = "or the file of your own: a column map (YAML), or data with one beside it"
    names = f"{', '.join((*NAMES, runner.ALL))}; {own}"
    add("--benchmark", required=True, type=_benchmark, metavar="NAME", help=names)
    add("--data", type=Path, help="the authors' files: a folder, or the annotation file")
    add("--variant", help="part or language, e.g. zh of slake; default: the benchmark's first")
    several: dict[str, Any] = {"nargs": "+", "default": ()}
    names = "one or several, or all; see the verb protocols"
    add("--protocol", dest="protocols", metavar="P", help=names, **several)
    names = "further scorers of the same answers, or all"
    add("--scorer", dest="scorers", metavar="S", help=names, **several)
    add("--out", type=Path, help="folder of results (default work_dirs/evaluation/<model>)")
    tokens = f"tokens of an answer at the most (default {MAX_NEW_TOKENS}); stored answers are known by it"
    add("--max-new-tokens", type=positive_int, metavar="N", help=tokens)
    unread = "exit with 3 above this share of answers cut, empty, refused or not understood (default 0.1)"
    add("--max-unread", type=float, default=0.1, metavar="SHARE", help=unread)
    add("--limit", type=positive_int, metavar="N", help="the first N questions of each protocol")
    only = "score stored answers; nothing is asked or loaded"
    add("--score-only", action="store_true", help=only)
    controls = "ask also with blank and other images, options shuffled, none of the above, negated"
    add("--controls", action="store_true", help=controls)
    add("--json", action="store_true", help="one JSON object on standard output")
    shown = f"questions on the HTML page (default {runner.SHOWN}; 0: no page)"
    add("--report-questions", type=int, default=runner.SHOWN, metavar="N", help=shown)
    group = parser.add_argument_group("a model in this process")
    add = group.add_argument
    add("--batch-size", type=positive_int, default=16, help="questions asked together (default 16)")
    add("--name", help="what tables call the model (default: its folder's name)")
    add("--loader", choices=("auto", "ours", "transformers"), default="auto")
    add("--llm", help="base language model of an export that has none")
    add("--vision", help="base vision tower of an export that has none")
    add_dtype_argument(group)
    add_allow_pickle(group)
    add("--device", help="e.g. cpu or cuda:1 (default: the GPU of this process)")
    group = parser.add_argument_group("a model behind an OpenAI-compatible server")
    add = group.add_argument
    add("--endpoint", metavar="URL", help="base URL, e.g. http://localhost:8000/v1")
    key = "environment variable of {} key (default OPENAI_API_KEY, if it is set)"
    add_api_key_argument(group, key.format("the"))
    moved = "address that this server had when its stored answers were given: go on with them"
    add("--moved-from", metavar="URL", help=moved)
    add("--in-flight", type=positive_int, default=16, help="requests at once (default 16)")
    add("--retries", type=int, default=6, help="of one request (default 6)")
    add("--timeout", type=float, default=300.0, help="seconds for one answer (default 300)")
    add("--temperature", type=_temperature, default=0.0, help="default 0; none: not sent")
    group = parser.add_argument_group("answers that another kit has stored")
    add = group.add_argument
    files = "its files (VLMEvalKit, lmms-eval, MMMU, LLaVA); MODEL is a name then"
    add("--answers", nargs="+", default=(), metavar="FILE", help=files)
    columns = "columns of the question's id and of the answer, of any other file"
    add("--answer-columns", nargs=2, metavar=("ID", "ANSWER"), help=columns)
    group = parser.add_argument_group("a judge of free answers")
    add = group.add_argument
    add("--judge", metavar="URL", help="base URL of an OpenAI-compatible server")
    add("--judge-model", metavar="NAME")
    add_api_key_argument(group, key.format("its"), option="--judge-api-key-env")
    return parser


def _benchmark(text: str) -> str:
    if text not in (*NAMES, runner.ALL) and not is_own(text):
        raise argparse.ArgumentTypeError(
            f"no benchmark is called {text!r}: {', '.join((*NAMES, runner.ALL))}, or the file of your own"
        )
    return text


def _temperature(text: str) -> float | None:
    return None if text.lower() == "none" else float(text)


if __name__ == "__main__":
    sys.exit(main())
