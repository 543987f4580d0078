"""Advice on exceptions that torch and Python raise for usual mistakes in a script, by their text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from traceml.diagnosis.advice import EMPTY_DATA_SET
from traceml.diagnosis.facts.ends import RankExit
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.formatting import count_text, plural

__all__ = ["for_exception", "mentioned"]

_Text = TypeVar("_Text")

_LABEL = re.compile(r"Target (-?\d+) is out of bounds")
_PRODUCT = re.compile(r"shapes cannot be multiplied \(\d+x(\d+) and (\d+)x\d+\)")
_RELATIVE = re.compile(r"No such file or directory: '([^/'][^']*)'")
_NORMALIZATION = "expected more than 1 value per channel"
_SIZES = (
    "must match", "shapes cannot be multiplied", "is invalid for input of size", "to match target batch_size",
    _NORMALIZATION,
)  # fmt: skip
"""What torch says of tensors that differ in size."""
_OF_SAMPLES: Mapping[tuple[str, ...], str] = {
    ("stack expects each tensor to be equal size", "storage that is not resizable"): (
        "The samples of a batch differ in size: bring them to one size in the data set (resize, crop, pad), or pad "
        "them in a collate_fn (torch.nn.utils.rnn.pad_sequence)."
    ),
    ("can't pickle", "cannot pickle"): (
        "A worker that is started by spawn or forkserver gets the data set by pickle: use functions of a module in "
        "place of lambdas and local ones, and open files, locks and connections in the worker (worker_init_fn, or the "
        "first __getitem__)."
    ),
    ("default_collate: batch must contain", "'nonetype' object has no attribute 'numel'"): (
        "The loader makes batches of tensors, arrays, numbers, texts, and lists and dicts of them: an image needs the "
        "transform ToTensor() or ToImage(), a sample that is None must be left out in a collate_fn."
    ),
    ("cannot re-initialize cuda in forked",): (
        "Return CPU tensors from the data set, and move the batch to the GPU in the loop; workers that need the GPU "
        "must be started with multiprocessing_context='spawn'."
    ),
}
"""What fails in a data loader."""
_BY_TEXT: Mapping[tuple[str, ...], str] = {
    ("index out of range in self",): (
        "An index is not below the size of the embedding: compare the largest token or position with num_embeddings. "
        "Tokens that were added to a tokenizer need resize_token_embeddings, longer texts more positions."
    ),
    ("backward through the graph a second time",): (
        "A part of that graph was used by an earlier backward: detach() what is kept from step to step (a hidden "
        "state, a target, a running mean), or add the losses and call backward once. retain_graph=True is for two "
        "backwards of one forward."
    ),
    ("modified by an inplace operation",): (
        "torch.autograd.set_detect_anomaly(True) names the operation in forward whose tensor was changed later: write "
        "x = x + y in place of x += y or of a method that ends in _, and call optimizer.step() after all backwards "
        "that use its weights."
    ),
    ("does not require grad and does not have a grad_fn",): (
        "Nothing with gradients leads to that tensor: its parameters are frozen, it was computed under no_grad or "
        "inference_mode, or detach(), item(), argmax or NumPy came between."
    ),
    ("in loading state_dict",): (
        "The checkpoint is of another model; the message lists what differs. Names with `module.` are of "
        "DistributedDataParallel (save model.module.state_dict()), those with `_orig_mod.` of torch.compile."
    ),
    ("multi-target not supported", "expected target dtype to be long", "for target with class probabilities"): (
        "cross_entropy takes the numbers of the classes as int64 without a dimension for them (y.squeeze(1).long()), "
        "or probabilities as floats in the shape of the output."
    ),
    ("must be the same as input size", "be cast to the desired output type long"): (
        "The binary cross entropy takes targets in the shape and type of the output: y.float(), and unsqueeze(1) where "
        "the output has a dimension more."
    ),
    ("elements of input should be between 0 and 1",): (
        "binary_cross_entropy takes probabilities: use binary_cross_entropy_with_logits and no sigmoid. nan is not "
        "between 0 and 1 either."
    ),
    ("one of the following scalar types: long, int",): (
        "Tokens and indices are integers: make them so where they are read, or call .long(). A tensor of an empty list "
        "is of floats."
    ),
    ("channels, but got",): (
        "A convolution takes images as (batch, channels, height, width): permute(0, 3, 1, 2) where the channels are "
        "last, convert('RGB') where an image is gray, or fit in_channels."
    ),
    ("output size is too small", "be greater than actual input size"): (
        "The image is too small for that many layers with a stride: use larger images, or leave out a pooling."
    ),
    ("got num_samples=0",): EMPTY_DATA_SET,
    ("empty parameter list",): (
        "The model has no parameters: layers in a list or dict need nn.ModuleList or nn.ModuleDict, layers that are "
        "made later must be made before the optimizer, and a filter of parameters may leave none."
    ),
    ("a non-leaf tensor",): (
        "What is optimized must be made as it is: call .to(), or the operation on it, before requires_grad_(), or use "
        "nn.Parameter."
    ),
    ("boolean value of tensor with more",): (
        "A condition takes one number: use .any(), .all() or torch.where. A loss class is made first and called then: "
        "nn.CrossEntropyLoss()(output, target)."
    ),
    ("weights only load failed",): (
        "The file has more than tensors in it: torch.load(path, weights_only=False), if you trust its source, or save "
        "state_dict() and plain numbers."
    ),
    ("failed finding central directory",): (
        "The file is not complete, as after a run that was ended while it saved, or a full disk: load an earlier one. "
        "Saved under another name first and then renamed (os.replace), a file is always whole."
    ),
    ("parameter group that doesn't match", "different number of parameter groups"): (
        "The checkpoint is of an optimizer with other parameters: make the optimizer after all changes of the model "
        "(frozen layers, a new head), as when it was saved."
    ),
    (
        "couldn't connect to 'https://huggingface.co",
        "localentrynotfounderror",
        "maxretryerror",
        "cannot find the requested files in the disk cache",
    ): (
        "This host reaches no such server: load the files on one that does (`hf download`), on a file system that both "
        "have (HF_HOME), and set HF_HUB_OFFLINE=1."
    ),
    ("attempting to unscale fp16 gradients",): (
        "GradScaler is for weights of 32 bits: leave the model in float32 and run forward under torch.autocast, or "
        "train in bfloat16 without a scaler."
    ),
    ("the specified number of total steps is",): (
        "The schedule was made for fewer steps: total_steps is epochs * len(loader), divided by the batches that are "
        "accumulated, and includes those that a resumed run has made before."
    ),
    ("type numpy.object_",): (
        "That array holds objects, as of rows that differ in length, texts or None: convert them to numbers first."
    ),
    ("operator torchvision::", "load custom c++ ops", "undefined symbol"): (
        "An extension was built for another torch: install versions that belong together (torch, torchvision, "
        "torchaudio) from one index, or build the extension again."
    ),
    (
        "tensors to be on the same device",
        "(torch.floattensor) and weight type (torch.cuda",
        "(torch.cuda.floattensor) and weight type (torch.floattensor",
    ): (
        "Move them to one device: the model once, the batch in each step; a tensor that a module makes needs "
        "register_buffer, or device=x.device."
    ),
    ("expected scalar type", "have the same dtype", "found dtype", "and bias type", "and weight type"): (
        "Convert one of the tensors: arrays of NumPy are float64 where weights are float32 (batch.float()), and what "
        "comes out of autocast may be of 16 bits (loss in float())."
    ),
    ("torch not compiled with cuda",): (
        "This torch is a build for the CPU: install one for CUDA, or choose the device by torch.cuda.is_available()."
    ),
    ("no cuda gpus are available", "found no nvidia driver"): (
        "torch sees no GPU: look at nvidia-smi, at CUDA_VISIBLE_DEVICES, and at what the job has asked of its "
        "scheduler (--gpus, --gres)."
    ),
    ("numpy() on tensor that requires grad",): "Use .detach().cpu().numpy(), or .item() for a single number.",
    ("finished its bootstrapping phase",): (
        'Put what the script does under `if __name__ == "__main__":`: a process that is started by spawn or forkserver '
        "imports the script."
    ),
    ("bdb.bdbquit",): (
        "A breakpoint was reached, and its debugger had no input or was left: remove breakpoint() or pdb.set_trace() "
        "from the script, or set PYTHONBREAKPOINT=0."
    ),
    ("modulenotfounderror",): (
        "Install it for the Python that runs the ranks; for a file of your own, start the run in its folder, or name "
        "that folder in PYTHONPATH."
    ),
}


def for_exception(ended: RankExit, facts: JobFacts) -> str | None:
    """Return advice on the exception of a rank; None if its text is of no usual mistake."""
    if text := _for_sizes(ended, facts):
        return text

    if label := _LABEL.search(ended.exception or ""):
        return (
            f"A label is {label[1]}: labels go from 0 to the number of the model's outputs less one. Those that count "
            "from 1 need `- 1`, those without meaning ignore_index."
        )

    if path := _RELATIVE.search(ended.exception or ""):
        return (
            f"{path[1]} is a relative path: it begins in the folder in which the run was started, unless the script "
            "changes that."
        )

    of_samples = mentioned(ended, _OF_SAMPLES) if ended.open_phase == "input_wait" else None
    return of_samples or mentioned(ended, _BY_TEXT)


def mentioned(ended: RankExit, texts: Mapping[tuple[str, ...], _Text]) -> _Text | None:
    """Return the first text of whose words, in lower case, the exception of a rank has any; None without one."""
    return next((text for words, text in texts.items() if ended.exception_mentions(*words)), None)


def _for_sizes(ended: RankExit, facts: JobFacts) -> str | None:
    """Return advice where tensors differ in size: the last batch of an epoch, or the features of a layer."""
    if not ended.exception_mentions(*_SIZES):
        return None

    if batch := _last_batch_text(ended, facts):
        return batch

    if product := _PRODUCT.search(ended.exception or ""):
        return (
            f"The left matrix has {product[1]} columns, the right one {product[2]} rows: fit in_features of the layer, "
            "or look at what flattens, crops or pools before it."
        )

    return None


def _last_batch_text(ended: RankExit, facts: JobFacts) -> str:
    """Return advice where the batch of the step was the smaller one at the end of an epoch; else ""."""
    loader, samples = facts.loader, ended.samples
    if not samples or loader is None or not loader.length or not loader.batch_size or samples >= loader.batch_size:
        return ""

    if samples not in {(loader.samples_of_rank(ranks) or 0) % loader.batch_size for ranks in (1, facts.world_size)}:
        return ""

    had = f"The last batch of the epoch had {plural(samples, 'sample')} in place of {count_text(loader.batch_size)}"
    if ended.exception_mentions(_NORMALIZATION):
        return f"{had}: pass drop_last=True to the loader."

    at = f" at {ended.place}" if ended.place else ""
    return f"{had}: take the size from the batch itself{at}, or pass drop_last=True to the loader."
