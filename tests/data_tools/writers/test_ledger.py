# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import sqlite3
import subprocess
import sys

import pytest

from data_tools.writers.ledger import Expense, Ledger, Reply
from gmai_xtuner.core.errors import CorpusError

COST = Expense(100, 50, 0.5)


def test_an_answer_is_kept_with_its_cost(tmp_path):
    path = tmp_path / "folder" / "answers.sqlite"
    reply = Reply("text", "stop", "", Expense(80, 20, 0.25))
    with Ledger(path, job="a") as ledger:
        assert ledger.answer("k") is None
        assert ledger.claim("k", COST) is None
        ledger.settle("k", "m", reply, COST)
        assert ledger.answer("k") == reply
    with Ledger(path, job="b") as ledger:
        kept = ledger.answer("k")
        assert (kept, kept.new) == (reply, False)
        assert ledger.spent() == Expense()
        assert ledger.shares("m") == (0.8, 0.4)
        assert ledger.shares("other") is None
    with Ledger(path, job="a") as ledger:
        assert ledger.spent() == Expense(80, 20, 0.25)


def test_what_a_dead_run_left_is_lost_money_and_free_again(tmp_path):
    """Another process claims two keys and dies without a word."""
    path = tmp_path / "answers.sqlite"
    program = f"""
import os, signal
from pathlib import Path
from data_tools.writers.ledger import Expense, Ledger
ledger = Ledger(Path({str(path)!r}), job="a")
ledger.claim("k", Expense(100, 50, 0.5)); ledger.claim("l", Expense(10, 5, 0.25))
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == -9
    with Ledger(path, job="b") as ledger:
        assert ledger.claim("k", COST) is None
        assert ledger.spent() == Expense()  # it isn't b's loss
    with Ledger(path, job="a") as ledger:
        assert ledger.spent() == Expense(110, 55, 0.75)
    # Only the lock of a run that lives is left.
    assert list((tmp_path / "answers.sqlite.runs").iterdir()) == []


def test_a_living_runs_claim_stands(tmp_path):
    path = tmp_path / "answers.sqlite"
    with Ledger(path, job="a") as first:
        assert first.claim("k", COST) is None
        with Ledger(path, job="b") as second:
            run = second.claim("k", COST)
            assert run == first.run
            assert second.is_alive(run)
            assert second.under_way("k")
            second.release("k", None)  # not its own
            assert first.claim("k", COST) == first.run
        first.release("k", COST)
        assert first.spent() == COST
        assert not first.under_way("k")


def test_a_transaction_is_all_or_nothing(tmp_path):
    with Ledger(tmp_path / "answers.sqlite", job="a") as ledger:

        def half() -> None:
            with ledger.transaction():
                ledger.claim("k", COST)
                ledger.settle("k", "m", Reply("x"), COST)
                raise KeyError

        with pytest.raises(KeyError):
            half()
        assert ledger.answer("k") is None
        assert ledger.spent() == Expense()


def test_what_is_known_of_servers_grows(tmp_path):
    with Ledger(tmp_path / "answers.sqlite", job="a") as ledger:
        ledger.remember("u", "m", {"structured": "text"})
        ledger.remember("u", "m", {"max_tokens_name": "max_tokens"})
        assert ledger.traits("u", "m") == {"structured": "text", "max_tokens_name": "max_tokens"}
        assert ledger.traits("u", "other") == {}


def test_files_that_are_no_ledger_are_told(tmp_path):
    path = tmp_path / "answers.sqlite"
    path.write_bytes(b"no database at all, " * 100)
    with pytest.raises(CorpusError, match=r"answers\.sqlite: the ledger .* name another file"):
        Ledger(path, job="a")
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version=99")
    with pytest.raises(CorpusError, match="a ledger of version 99, this program writes version 1"):
        Ledger(path, job="a")


def test_money_survives_a_power_cut(tmp_path):
    with Ledger(tmp_path / "answers.sqlite", job="a") as ledger:
        assert ledger._connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
        assert ledger._connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
