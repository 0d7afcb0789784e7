# SPDX-License-Identifier: Apache-2.0

"""Cluster files start one ``xtuner`` a node, stop it with a checkpoint, and believe status.json alone.

Schedulers and trainer are stand-ins here: scripts that write down what they are called with.
"""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

CLUSTERS = Path(__file__).parents[2] / "examples" / "clusters"
XTUNER = """#!/bin/bash
echo "$NNODES $NODE_RANK $ADDR $PORT $NPROC_PER_NODE $*" >> "$CALLS"
while [ "$STATE" = stopped ] && [ ! -e "$WORK_DIR/stop" ]; do sleep 0.02; done
mkdir -p "$WORK_DIR"
echo "{\\"state\\": \\"$STATE\\"}" > "$WORK_DIR/status.json"
"""
STANDINS = {
    "xtuner": XTUNER,
    "srun": '#!/bin/bash\nwhile [[ $1 == -* ]]; do shift; done\nSLURM_NODEID=2 exec "$@"\n',
    "scontrol": '#!/bin/bash\n[ $1 = show ] && printf "first\\nb\\n" || echo "scontrol $*" >> "$CALLS"\n',
}
CALL = "4 2 {address} 29500 8 train configs/gmai_vl/stage1_shallow.py --deepspeed zero2"


@pytest.fixture
def start(tmp_path):
    for name, text in STANDINS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(script: str, state: str, **variables: str) -> subprocess.Popen[str]:
        made = {"WORK_DIR": str(tmp_path / "run"), "CALLS": str(tmp_path / "calls"), "STATE": state}
        path = f"{tmp_path}:{os.environ['PATH']}"
        environment = os.environ | variables | made | {"PATH": path}
        return subprocess.Popen(["bash", "-c", script], env=environment, text=True)

    return run


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


@pytest.mark.parametrize(
    ("state", "status", "last"),
    [("finished", 0, "train"), ("failed", 1, "train"), ("stopped", 0, "scontrol requeue 7")],
)
def test_slurm(start, tmp_path, state, status, last):
    names = {"SLURM_NNODES": "4", "SLURM_JOB_NODELIST": "n[1-4]", "SLURM_JOB_ID": "7"}
    job = start(f"exec bash {CLUSTERS / 'slurm.sh'}", state, **names)
    while state == "stopped" and not (tmp_path / "calls").exists():
        time.sleep(0.02)
    if state == "stopped":  # the time is nearly up
        job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == status
    assert calls(tmp_path)[0].startswith(CALL.format(address="first"))
    assert last in calls(tmp_path)[-1]


def test_kubernetes(start, tmp_path):
    service, job = yaml.safe_load_all((CLUSTERS / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    fixed = {one["name"]: one["value"] for one in container["env"]} | {"JOB_COMPLETION_INDEX": "2"}
    (script,) = container["args"]
    assert start(script, "failed", **fixed).wait(60) == 1
    assert start(script, "finished", **fixed).wait(60) == 0
    assert calls(tmp_path)[0].startswith(CALL.format(address="gmai-stage1-0.gmai-stage1"))
    assert int(fixed["NNODES"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert int(fixed["NPROC_PER_NODE"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    # The first pod's name is found by the service.
    assert fixed["ADDR"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]


def test_skypilot(start, tmp_path):
    task = yaml.safe_load((CLUSTERS / "skypilot.yaml").read_text())
    given = {
        "SKYPILOT_NUM_NODES": str(task["num_nodes"]),
        "SKYPILOT_NODE_RANK": "2",
        "SKYPILOT_NUM_GPUS_PER_NODE": task["resources"]["accelerators"].partition(":")[2],
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    }
    assert start(task["run"], "failed", **given).wait(60) == 1
    assert start(task["run"], "finished", **given).wait(60) == 0
    assert calls(tmp_path)[0].startswith(CALL.format(address="10.0.0.1"))
    assert json.loads((tmp_path / "run/status.json").read_text()) == {"state": "finished"}
