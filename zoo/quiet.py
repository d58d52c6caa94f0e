"""What the libraries print."""

import logging


def quiet_libraries() -> None:
    """Only errors of the libraries, whose reports on new heads are ours to judge, and no bars for reading files.

    Called before anything imports them: bitsandbytes speaks while it is imported, of a faster 4-bit kernel that the hub
    would have.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # peft imports torchao where it is installed, which misses libraries of GPUs and has what torch will no longer want
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # a pipeline lists all classes that it knows where a model stands within adapters, and works
    logging.getLogger("transformers.pipelines.base").setLevel(logging.CRITICAL)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
