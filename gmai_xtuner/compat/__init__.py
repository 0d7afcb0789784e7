# SPDX-License-Identifier: Apache-2.0

"""Every workaround for the pinned packages, one file a package: what goes wrong, and until when it is needed.

:func:`apply` is called by ``import gmai_xtuner.plugin``: a string-style config imports it before xtuner looks
at anything else, and there is no later place that all ``xtuner`` commands pass.
"""

from gmai_xtuner.checkpoint.pickles import install_safe_reader
from gmai_xtuner.compat import bitsandbytes, deepspeed, mmengine, torch, xtuner
from gmai_xtuner.train import names


def apply() -> None:
    """Install all workarounds; calling it again changes nothing."""
    deepspeed.keep_standard_output_clean()
    names.register()
    install_safe_reader()
    torch.sleep_while_waiting_for_threads()
    mmengine.launch_without_gpu()
    deepspeed.skip_shared_memory_op()
    deepspeed.wait_for_gathered_weights()
    xtuner.read_zero_checkpoints_exactly()
    xtuner.read_frozen_weights()
    xtuner.resume_from_a_work_dir()
    xtuner.check_before_anything_is_built()
    bitsandbytes.import_bitsandbytes_without_triton_ops()
    deepspeed.keep_gradients_until_reduced()
    deepspeed.wait_for_the_stream_of_a_gradient()
    deepspeed.accumulate_all_gradients_in_fp32()
    xtuner.convert_checked_and_exact()
