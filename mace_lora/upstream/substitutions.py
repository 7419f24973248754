"""The table of all that we take from mace-torch or put in the place of something of its own.

A row for each name: where it is looked up, the parameters that we rely on, what stands there
instead and when, why, and what would make that unnecessary (a number is an issue or pull request
of ACEsuit/mace). `names` checks the rows and does the substituting; README.md shows them. No other
file of the package names a module of mace-torch, except for the imports of `mini`.
"""

from __future__ import annotations

from dataclasses import dataclass

_RUN = "mace.cli.run_train"
_TOOLS = "mace.tools"
_TRAIN = "mace.tools.train"
_SCRIPTS = "mace.tools.scripts_utils"
_DATA = "mace.data"

# When ours stands there
RUN = "while mace-torch's script runs"
CONVERSION = "while a model is converted to cuequivariance"
PROCESS = "from the first model on, to the end of the process"
OBJECT = "in single objects"
NONE_KNOWN = "none known"


@dataclass(frozen=True)
class Row:
    """One name.

    Attributes:
        module: where it is looked up.
        signature: the name, and in parentheses those of its parameters that we rely on; without
            parentheses it may be any object.
        use: what stands there instead, or what we call it for.
        why: the reason for the substitute; empty for what is only called.
        until: what would make the substitute unnecessary.
        when: the time during which ours stands there; empty for what is only called.
        package: that must be installed for this name to exist.
    """

    module: str
    signature: str
    use: str
    why: str = ""
    until: str = NONE_KNOWN
    when: str = ""
    package: str = ""

    @property
    def attribute(self) -> str:
        """The name in its module; a dot leads into a class."""
        return self.signature.partition("(")[0]

    @property
    def parameters(self) -> list[str]:
        """The parameters that must be there."""
        inside = self.signature.partition("(")[2].rstrip(")")
        return inside.split(", ") if inside else []


def _in_run(
    module: str, signature: str, use: str, why: str, until: str = NONE_KNOWN, package: str = ""
) -> Row:
    return Row(module, signature, use, why, until, RUN, package)


_LOADER = "the same, and the model is remembered"
_LOADER_WHY = "the elements of the frames are checked against it before the model is built"
_KERNELS = "nothing: the model is converted already"
_KERNELS_WHY = "the script converts after the injection, and so drops the adapters"
_BACK = "merges, converts back, and proves the result"
_BACK_WHY = "the script converts the unmerged model back, and so saves it without adapters"
_STEP = "the same, computed by the backend of `--step`"
_STEP_WHY = "time; effective weights are computed once, not at each use"
_WHOLE = "the same, to a file that appears only when it is complete"
_WHOLE_WHY = "a full disk or a kill leaves half a file under the name of a good one"

# In the order in which the script comes to them
SUBSTITUTED: dict[str, Row] = {
    "init_distributed": _in_run(
        _RUN,
        "init_distributed(args)",
        "the same, for CPUs too",
        "there is no gloo branch, so that `--distributed` fails without GPUs",
        "none known for CPUs (458 and 1504 are about starting without SLURM)",
    ),
    "foundation_names": _in_run(
        _RUN,
        "mace_mp_names",
        "their list, and the name or file of the model that we have loaded",
        "`mini` and files come from our loader, which says what is wrong with a file",
    ),
    "mace_mp": _in_run(_RUN, "mace_mp(model, device, default_dtype)", _LOADER, _LOADER_WHY),
    "mace_off": _in_run(_RUN, "mace_off(model, device, default_dtype)", _LOADER, _LOADER_WHY),
    "mace_omol": _in_run(_RUN, "mace_omol(device, default_dtype)", _LOADER, _LOADER_WHY),
    "mace_polar": _in_run(_RUN, "mace_polar(model, device, default_dtype)", _LOADER, _LOADER_WHY),
    "remove_head": _in_run(
        _RUN, "remove_pt_head(model, head_to_keep)", _LOADER, "E0s are estimated with that head"
    ),
    "head_config": _in_run(
        _RUN,
        "dict_head_to_dataclass(head, head_name, args)",
        "the same, with what a statistics file says of elements, and with E0s as numbers where "
        "they are fitted to frames in HDF5 or LMDB",
        "a statistics file overrules `--E0s`, and can't be read as numpy 2 prints it (804)",
    ),
    "replay_data": _in_run(
        _RUN,
        "assemble_replay_data(name, args, head_config_pt, tag)",
        "the same, its errors in words",
        "without a network there is a traceback of what the download said",
    ),
    "load_xyz": _in_run(
        _DATA,
        "load_from_xyz(file_path, key_specification)",
        "reads and checks all frames",
        "under ASE's own keys labels that lack are trained as 0, forces have constraints applied, "
        "and E0s of isolated atoms are 0; types that are numbers have no weight",
    ),
    "split": _in_run(
        _DATA,
        "random_train_valid_split(items, valid_fraction, seed)",
        "the same, for two frames or more; only the first process writes the indices down",
        "errors speak of numpy, and several processes write one file",
    ),
    "atomic_energies": _in_run(
        _RUN,
        "get_atomic_energies(E0s, train_collection, z_table)",
        "the same, its errors in words, its result checked",
        "NaN or missing E0s give a NaN model without a word",
    ),
    "estimate_e0s": _in_run(
        _DATA,
        "estimate_e0s_from_foundation(foundation_model)",
        "the same, after a cast of the model to the precision of the run",
        "TorchScript refuses a float32 model on float64 frames",
        "1009 (open: no global default precision)",
    ),
    "energies_as_array": _in_run(
        _RUN,
        "dict_to_array(input_data, heads)",
        "the same, and the elements of the columns are remembered",
        "E0s of more elements than the data have fail inside the model",
        "605 (open)",
    ),
    "load_stored": _in_run(
        _RUN,
        "load_dataset_for_path(file_path, z_table, head_config)",
        "the same, then the frames of HDF5 and LMDB files are checked",
        "as for `load_from_xyz`",
    ),
    "frame_of_lmdb": _in_run(
        "mace.data.lmdb_dataset",
        "config_from_atoms(atoms, key_specification)",
        "the same, with charge and spin under the names that they have in such files, too",
        "they are looked for as `total_charge` and `total_spin`, whatever the flags say, and taken "
        "as neutral singlets where they are called `charge` and `spin`, as in OMol's files",
    ),
    "graphs": _in_run(
        _DATA,
        "AtomicData",
        "its `from_config` gives labels that lack no weight, and graphs the frame's own cell",
        "the stress of a slab is divided by the volume of a padded cell",
    ),
    "graph_of_replay": _in_run(
        "mace.tools.multihead_tools", "AtomicData", "the same", "as for `mace.data.AtomicData`"
    ),
    "graph_of_lmdb": _in_run(
        "mace.data.lmdb_dataset",
        "AtomicData",
        "the same; frames as read while they are checked",
        "as for `mace.data.AtomicData`",
    ),
    "hdf5": _in_run(
        _DATA,
        "HDF5Dataset(file_path, r_max, z_table, atomic_dataclass)",
        "the same, with our graphs and all frames",
        "labels that lack weigh 1; a test set of an odd number of frames loses its last batch",
    ),
    "loss": _in_run(
        _RUN,
        "get_loss_fn(args, dipole_only, compute_dipole)",
        "the same, or a loss that heeds all weights",
        "`huber`, `universal` and losses of dipoles ignore weights, and so count what lacks as 0",
    ),
    "stage_two": _in_run(
        _RUN, "get_swa(args, model, optimizer, swas)", "the same", "as for `get_loss_fn`"
    ),
    "test_files": _in_run(
        _RUN,
        "get_files_with_suffix(dir_path, suffix)",
        "all HDF5 files of a folder, where none is called so",
        "`mace_prepare_data` doesn't call them so, and none is evaluated",
    ),
    "avg_num_neighbors": _in_run(
        _RUN,
        "get_avg_num_neighbors(args, train_loader)",
        "the same, after a check for at least one batch and with a known order of the frames",
        "the first use of the training batches: `torch.cat` of nothing",
    ),
    "configure_model": _in_run(
        _RUN,
        "configure_model(args, model_foundation, z_table)",
        "the same; then the E0s that were asked for are put back and the energy offset is logged",
        "where the elements are the foundation model's, its E0s are copied over them",
    ),
    "inject": _in_run(
        _RUN,
        "inject_LoRAs(model, rank, alpha)",
        "converts the model to other kernels, where asked to, then attaches the adapter",
        "the script's LoRA reaches fewer layers, and is dropped by the later conversion",
        "1540 (open) for the order",
    ),
    "count_parameters": _in_run(
        _TOOLS,
        "count_parameters(module)",
        "counts those that are trained",
        "the log calls frozen parameters trainable",
    ),
    "to_cueq": _in_run(
        _RUN, "run_e3nn_to_cueq(input_model, device)", _KERNELS, _KERNELS_WHY, "1540 (open)"
    ),
    "to_oeq": _in_run(_RUN, "run_e3nn_to_oeq(input_model, device)", _KERNELS, _KERNELS_WHY),
    "params_options": _in_run(
        _RUN,
        "get_params_options(args, model)",
        "a group for each part of the model, with all that is trained in it",
        "parameters are sorted by names of layers, which misses some adapters",
    ),
    "checkpoints": _in_run(
        _TOOLS,
        "CheckpointHandler",
        "writes and restores all of a run's state, adapters without the frozen base",
        "a restart repeats an epoch, loses EMA and the order of the frames",
        "509 (open)",
    ),
    "ema": _in_run(
        _RUN,
        "ExponentialMovingAverage(parameters, decay)",
        "averages what is trained",
        "frozen parameters are averaged too",
    ),
    "lbfgs": _in_run(
        _RUN, "LBFGS(params)", "gets what is trained", "frozen parameters are moved, too"
    ),
    "ddp": _in_run(
        _RUN,
        "DDP(module, device_ids, broadcast_buffers)",
        "the same without `device_ids` on CPUs, and without sending buffers around",
        "refused on CPUs; hangs where one process validates a batch more",
    ),
    "train": _in_run(
        _TOOLS,
        "train(model, valid_loaders, train_loader, logger)",
        "the same loop, which can be left and entered at any step",
        "its state lies in local variables; patience doesn't end a run of one process; NaN "
        "counts as the best loss",
        "509 (open) and 1384 (1502 is open), and both checked for NaN",
    ),
    "take_step": _in_run(
        _TRAIN,
        "take_step(model, batch, optimizer, ema)",
        _STEP + "; warm-up, accumulation, dropout and a look at the loss around it",
        _STEP_WHY + "; a diverged run goes on",
    ),
    "step_of_lbfgs": _in_run(
        _TRAIN, "take_step_lbfgs(model, data_loader)", _STEP, "its closure changes weights"
    ),
    "evaluate": _in_run(_TRAIN, "evaluate(model, loss_fn, data_loader)", _STEP, _STEP_WHY),
    "metrics": _in_run(
        _TRAIN,
        "MACELoss(loss_fn)",
        "the same over labelled frames, each process on its own; its `forward` adds a batch and "
        "computes nothing",
        "frames without a label count as 0 in some errors; losses come out as many times too large "
        "as there are processes, and the run hangs where one has a batch more",
        "677 (open) for the hanging",
    ),
    "merge": _in_run(
        _RUN, "merge_lora_weights(model)", "merges any adapter, and proves it", "as for `inject`"
    ),
    "from_cueq": _in_run(_RUN, "run_cueq_to_e3nn(input_model, device)", _BACK, _BACK_WHY),
    "from_oeq": _in_run(_RUN, "run_oeq_to_e3nn(input_model, device)", _BACK, _BACK_WHY),
    "extract_config": _in_run(
        _RUN,
        "extract_config_mace_model(model)",
        "the same without gradients",
        "it makes arrays of E0s, scale and shift, which can be trained here",
    ),
    "jit": _in_run(
        _RUN,
        "jit",
        "its `compile` logs why a model can't be compiled",
        "the script passes over every error of it in silence",
    ),
    "save": _in_run("torch", "save(obj, f)", _WHOLE, _WHOLE_WHY),
    "jit_save": _in_run("torch.jit", "save(m, f)", _WHOLE, _WHOLE_WHY + ", and in silence"),
    "evaluate_at_the_end": _in_run(
        "mace.tools.tables_utils", "evaluate(model, loss_fn, data_loader)", _STEP, _STEP_WHY
    ),
    "transfer_contractions": Row(
        "mace.cli.convert_e3nn_cueq",
        "transfer_symmetric_contractions(source_dict, target_dict)",
        "the same, and what it does to the weights is written down as a matrix",
        "the converted weights are others than e3nn's, so that an adapter would fit one side only",
        when=CONVERSION,
    ),
    "clebsch_gordan": Row(
        "mace.tools.cg",
        "O3_e3nn.clebsch_gordan",
        "the same in float64; what cuequivariance has kept by then is forgotten",
        "coefficients come in the default precision of the moment and are kept for ever: a "
        "float64 model built after a float32 one has matrices of float32 accuracy",
        "1009 (open: no global default precision)",
        PROCESS,
        "cuequivariance",
    ),
}

# Objects of mace-torch's of which one part is ours
CHANGED: dict[str, Row] = {
    "loader": Row(
        "mace.tools.torch_geometric.dataloader",
        "DataLoader(dataset, batch_size)",
        "`batch_sampler.sampler` is our `FrameOrder`; with several processes that of validation "
        "sets is the process's own part",
        "the order of the frames is nowhere written down, and another one for several processes",
        "509 (open)",
        OBJECT,
    ),
    "modules": Row(
        "mace",
        "modules",
        "a model with gates is of a class `Gated...` of ours, derived from its own",
        "conversions rebuild the classes they know, and would drop the gates without a word",
        when=OBJECT,
    ),
}

CALLED: dict[str, Row] = {
    "run": Row(_RUN, "run(args)", "the script"),
    "parser": Row("mace.tools.arg_parser", "build_default_arg_parser", "its flags"),
    "polar_names": Row(_RUN, "polar_model_names", "which names are of PolarMACE models"),
    "reads_with_ase": Row(_SCRIPTS, "check_path_ase_read(filename)", "which files are .xyz"),
    "train_one_epoch": Row(
        _TRAIN, "train_one_epoch(data_loader, optimizer, ema, epoch)", "all steps of an epoch"
    ),
    "log_validation": Row(_TRAIN, "valid_err_log(eval_metrics, epoch)", "a line of the log"),
    "slurm": Row(
        "mace.tools.slurm_distributed", "DistributedEnvironment", "variables of SLURM for torch"
    ),
    "architecture": Row(_SCRIPTS, "extract_config_mace_model(model)", "arguments of a model"),
    "one_head": Row(_SCRIPTS, "remove_pt_head(model, head_to_keep)", "one head of several"),
    "transfer_weights": Row(
        "mace.tools.finetuning_utils",
        "load_foundations_elements(model, table, load_readout, max_L)",
        "weights of a foundation model in one of fewer elements",
    ),
    "reduce_loss": Row(
        "mace.modules.loss", "reduce_loss(raw_loss, ddp)", "the mean over all processes"
    ),
    "elements": Row(_TOOLS, "AtomicNumberTable(zs)", "elements of a model"),
    "batch": Row("mace.tools.torch_geometric", "Batch.from_data_list(data_list)", "a batch"),
    "graph": Row(_DATA, "AtomicData.from_config(config, z_table, cutoff, heads)", "a graph"),
    "frame": Row(
        "mace.data.utils",
        "Configuration(atomic_numbers, positions, properties, property_weights, cell, pbc)",
        "a frame with its labels",
    ),
    "configuration": Row(
        _DATA, "config_from_atoms(atoms, key_specification, head_name)", "a frame of ASE's atoms"
    ),
    "keys": Row(_DATA, "KeySpecification", "names of labels"),
    "update_keys": Row(_DATA, "update_keyspec_from_kwargs(keyspec, keydict)", "names of labels"),
    "default_keys": Row("mace.tools.default_keys", "DefaultKeys.keydict", "names of labels"),
    "calculator": Row(
        "mace.calculators", "MACECalculator(models, device, default_dtype)", "ASE, once merged"
    ),
    "wandb_log": Row("wandb", "log", "validations, with `--wandb`", package="wandb"),
    "wandb_config": Row("wandb", "config", "the adapter, with `--wandb`", package="wandb"),
}

ROWS: dict[str, Row] = {**SUBSTITUTED, **CHANGED, **CALLED}
