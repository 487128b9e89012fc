"""How many threads a large problem gets by default: quotas of control groups, and the rule that decides."""

from types import SimpleNamespace

import pytest

import fastce
from fastce import _cpu
from fastce._cpu import _quota

V1 = "cpu.cfs_quota_us", "cpu.cfs_period_us"
TREES = [  # name, /proc/self/cgroup, files under /sys/fs/cgroup, the quota
    ("v2", "0::/a", {"a/cpu.max": "200000 100000\n"}, 2),
    ("v2 without a limit", "0::/a", {"a/cpu.max": "max 100000\n"}, None),
    ("v2, own limit least", "0::/a/b/c", {"a/cpu.max": "400000 100000", "a/b/c/cpu.max": "100000 100000"}, 1),
    ("v2, an ancestor's limit", "0::/a/b", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3),
    ("v2, controller off below", "0::/a/b/c", {"a/cpu.max": "300000 100000"}, 3),
    ("v2, root of a container", "0::/", {"cpu.max": "200000 50000"}, 4),
    ("v2, path of the host", "0::/system.slice/x.scope", {"cpu.max": "200000 100000"}, 2),
    ("v2, above the mount", "0::/../../x", {"cpu.max": "200000 100000"}, 2),
    ("a fraction is rounded up", "0::/a", {"a/cpu.max": "150000 100000"}, 2),
    ("at least one", "0::/a", {"a/cpu.max": "1000 100000"}, 1),
    ("v1", "3:cpu:/a\n2:memory:/b", {f"cpu/a/{V1[0]}": "250000", f"cpu/a/{V1[1]}": "100000\n"}, 3),
    ("v1 without a limit", "3:cpu:/a", {f"cpu/a/{V1[0]}": "-1", f"cpu/a/{V1[1]}": "100000"}, None),
    (
        "v1, joint controllers",
        "4:cpu,cpuacct:/a/b",
        {f"cpu,cpuacct/a/{V1[0]}": "200000", f"cpu,cpuacct/a/{V1[1]}": "100000"},
        2,
    ),
    ("v1, only half of the files", "3:cpu:/", {f"cpu/{V1[0]}": "200000"}, None),
    ("v1, other controllers", "3:cpuset:/a\n2:cpuacct:/a", {f"cpu/{V1[0]}": "1", f"cpu/{V1[1]}": "1"}, None),
    (
        "both, the limit in v1",
        "3:cpu:/a\n0::/a",
        {f"cpu/a/{V1[0]}": "200000", f"cpu/a/{V1[1]}": "100000", "unified/a/cgroup.procs": ""},
        2,
    ),
    ("both, the limit in v2", "3:memory:/a\n0::/a", {"unified/a/cpu.max": "200000 100000"}, 2),
    ("a colon in the name", "0::/a:b", {"a:b/cpu.max": "200000 100000"}, 2),
    ("an imitation", "0::/a", {"a/cpu.max": "", "cpu.max": "200000 100000"}, 2),
    ("no files", "0::/a", {}, None),
]


@pytest.mark.parametrize(("groups", "files", "expected"), [tree[1:] for tree in TREES], ids=[tree[0] for tree in TREES])
def test_the_quota_of_a_control_group(groups, files, expected, tmp_path):
    texts = {"proc/self/cgroup": groups, **{f"sys/fs/cgroup/{name}": text for name, text in files.items()}}
    for name, text in texts.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert _quota.read_quota(tmp_path) == expected


def test_no_control_groups(tmp_path):
    assert _quota.read_quota(tmp_path) is None


def test_the_quota_is_read_once(monkeypatch):
    """Only a first large call may read files."""
    first = _quota.cpu_quota()
    monkeypatch.setattr(_quota, "read_quota", lambda root: pytest.fail(f"{root} is read again"))
    assert _quota.cpu_quota() == first


@pytest.mark.parametrize(
    ("maximum", "changes", "n_threads", "rule"),
    [  # a machine of 64 processors
        (64, {}, 64, "OpenMP's maximum"),
        (64, {"affinity": 48}, 48, "CPU affinity"),
        (64, {"quota": 3}, 3, "CPU quota of the control group"),
        (64, {"quota": 3, "affinity": 2}, 2, "CPU affinity"),
        (64, {"quota": 2, "affinity": 3}, 2, "CPU quota of the control group"),
        (64, {"quota": 100}, 64, "OpenMP's maximum"),
        (64, {"quota": 3, "environment": "64"}, 64, "OMP_NUM_THREADS"),
        (16, {"quota": 3}, 16, "a limit set at run time"),
        (1, {"quota": 3, "environment": "64"}, 1, "a limit set at run time"),
    ],
)
def test_the_rule_that_decides(maximum, changes, n_threads, rule, monkeypatch):
    affinity = set(range(changes.get("affinity", 64)))
    monkeypatch.setattr(_cpu, "build_info", {**_cpu.build_info, "openmp": True})
    monkeypatch.setattr(_cpu, "_MAXIMUM", 64)
    monkeypatch.setattr(_cpu, "_OMP_NUM_THREADS", changes.get("environment"))
    monkeypatch.setattr(_cpu, "kernels", SimpleNamespace(max_threads=lambda: maximum))
    monkeypatch.setattr(_cpu, "cpu_quota", lambda: changes.get("quota"))
    monkeypatch.setattr(_cpu.os, "sched_getaffinity", lambda pid: affinity, raising=False)
    assert _cpu.effective_n_threads() == (n_threads, rule)
    threads = fastce.show_config(mode="dicts")["threads"]
    assert (threads["effective"], threads["decided_by"]) == (n_threads, rule)


def test_without_openmp_there_is_one_thread(monkeypatch):
    monkeypatch.setattr(_cpu, "build_info", {**_cpu.build_info, "openmp": False})
    assert _cpu.effective_n_threads() == (1, "built without OpenMP")
