"""``attnreg_cpu`` and threads: as many as torch has, the same bits for any number, and none that a forked process waits for."""

from __future__ import annotations

import os
import pickle
import select
import subprocess
import sys

import pytest
import torch
from cases import OPS

import attnreg
from attnreg import Window

WINDOW = Window(40, 23)


pytestmark = pytest.mark.usefixtures("library_for_cpus", "as_set")


def prepared(op, dtype=torch.float32):
    """A call that is worth several threads: function, leaves and an incoming gradient."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 700, 32, dtype=dtype) for heads in (4, 2, 2))
    inputs = {
        "local_dot_product": (query, key),
        "local_weighted_average": (torch.rand(2, 4, 700, WINDOW.size).to(dtype), value),
        "local_attention": (query, key, value),
    }[op]
    given = {} if op == "local_weighted_average" else {"bias": torch.randn(1, 4, 1, WINDOW.size)}
    if op == "local_attention":
        given["sinks"] = torch.randn(4)
    leaves = [each.requires_grad_() for each in (*inputs, *given.values())]
    if op == "local_attention":
        given |= {"dropout_p": 0.2, "seed": torch.tensor([7])}

    def run():
        return getattr(attnreg, op)(*inputs, WINDOW, backend="attnreg_cpu", **given)

    with torch.no_grad():
        return run, leaves, torch.randn(run().shape, dtype=dtype)


def results(call):
    """The result and gradients as bytes. Nothing here but the backend runs threads: torch's own would hang in a forked process."""
    run, leaves, grad = call
    output = run()
    gradients = torch.autograd.grad(output, leaves, grad)
    return [each.detach().view(torch.uint8).numpy().tobytes() for each in (output, *gradients)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", OPS)
def test_any_number_of_threads_gives_the_same_bits(op, dtype):
    call = prepared(op, dtype)
    torch.set_num_threads(1)
    alone = results(call)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        assert results(call) == alone


def in_a_fork(function, seconds=60):
    """What a function returns in a forked process, which may not take longer."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            with os.fdopen(write, "wb") as file:
                try:
                    returned = function()
                except BaseException as error:
                    returned = f"{type(error).__name__}: {error}"
                pickle.dump(returned, file)
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        ready, _, _ = select.select([file], [], [], seconds)
        found = pickle.load(file) if ready else os.kill(child, 9)
        os.waitpid(child, 0)
    assert ready, "the forked process hangs"
    if isinstance(found, str) and "autograd's threading in combination with fork" in found:
        pytest.skip("where there is a GPU, torch differentiates nothing in a forked process")
    return found


@pytest.mark.parametrize("op", OPS)
def test_a_process_forked_after_threads_ran_computes_the_same(op):
    torch.set_num_threads(2)
    call = prepared(op)
    before = results(call)
    assert in_a_fork(lambda: results(call)) == before
    # And so does a fork of a fork, and the process itself afterwards.
    assert in_a_fork(lambda: in_a_fork(lambda: results(call))) == before
    assert results(call) == before


FIRST_IN_THE_CHILD = """
import os, torch, attnreg
torch.set_num_threads(2)
torch.randn(1 << 20).exp()  # now there are threads that wait for work
query = torch.randn(1, 8, 512, 64)
child = os.fork()
if not child:
    attnreg.local_attention(query, query, query, attnreg.Window.causal(64), backend="attnreg_cpu")
    os._exit(0)
print(os.waitpid(child, 0)[1])
"""


def test_a_forked_process_may_be_the_first_to_load_the_library():
    # Python itself warns of forks beside threads since 3.12.
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FIRST_IN_THE_CHILD]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.stdout.strip(), done.stderr) == ("0", "")


class Outputs(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        torch.manual_seed(index)
        query = torch.randn(1, 2, 600, 32)
        return attnreg.local_attention(query, query, query, WINDOW, backend="attnreg_cpu")


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_data_loader_compute_the_same(start):
    torch.set_num_threads(2)
    here = torch.stack([Outputs()[index] for index in range(4)])
    loader = torch.utils.data.DataLoader(
        Outputs(), batch_size=4, num_workers=1, multiprocessing_context=start, timeout=120
    )
    (there,) = loader
    assert torch.equal(there, here)
