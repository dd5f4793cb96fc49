r"""Makes a dataset from others; the sources are never touched.

  E="python experiments/edit_dataset.py"
  $E --operation=merge --source=reach_a,reach_b --output=reach
  $E --operation=delete --source=reach --episodes=3,5:8 --output=reach_good
  $E --operation=convert --source=reach_v21 --version=v3.0 --output=reach
  $E --operation=convert --source=reach --pictures=video --codec=h264 --output=reach_video
  $E --operation=recompute_stats --source=reach --output=reach_again
  $E --operation=label_rewards --source=reach --reward=success_at_end --output=reach_rewarded
  $E --operation=import_hdf5 --source=demo.hdf5 --output=demo --layout=robomimic --fps=20
  $E --operation=resize_rlds --source=bridge --output=bridge_224 --size=224

--reward is success_at_end (of --episodes, if given), zero, a number, FILE.csv
(episode_index,frame_index,reward; or first_frame,last_frame for ranges), FILE.json ({"episode":
[frames]}, 1 there), or sub-goals, each 1 in the first frame of an episode where it holds:
--reward='info.near_object>=1,info.grasp_success>=1,next.success>=1' --feature=subgoal
"""

from absl import flags

from policymix import app

_CONFIG = app.define_config(__file__)
_OPERATION = flags.DEFINE_string("operation", None, "One of the above.", required=True)
_SOURCE = flags.DEFINE_multi_string(
    "source", None, "What to start from; several to merge, as a list or one by one.", required=True
)
_OUTPUT = flags.DEFINE_string("output", None, "Folder for the new dataset.", required=True)
_OPTIONS = {
    "episodes": flags.DEFINE_string("episodes", "", "3,5:8: to delete, or that are successes."),
    "version": flags.DEFINE_string("version", "", "v3.0 or v2.1; as the source where empty."),
    "pictures": flags.DEFINE_enum(
        "pictures", "", ["", "image", "video"], "image or video; as the source where empty."
    ),
    "codec": flags.DEFINE_string("codec", "", "av1 or h264; as the source where empty."),
    "reward": flags.DEFINE_string("reward", "", "The rule, see above."),
    "feature": flags.DEFINE_string("feature", "", "What holds rewards; next.reward if empty."),
    "layout": flags.DEFINE_string("layout", "", "libero, robomimic or aloha; recognised if empty."),
    "fps": flags.DEFINE_integer("fps", 0, "Of HDF5 files; 0: what they say."),
    "task": flags.DEFINE_string("task", "", "The instruction of all HDF5 episodes."),
    "swap_channels": flags.DEFINE_bool("swap_channels", False, "Whether HDF5 files hold BGR."),
    "skip_bad": flags.DEFINE_bool("skip_bad", False, "Leave out damaged HDF5 episodes."),
    "size": flags.DEFINE_integer("size", 224, "Side of resized pictures."),
    "quality": flags.DEFINE_integer("quality", 95, "Of resized pictures, as JPEG."),
}
_WORKERS = flags.DEFINE_integer("num_workers", 0, "That read and decode ahead; 0: one per core.")


def main() -> None:
    from policymix.runs import edit_dataset, import_hdf5, resize_rlds

    operation = _OPERATION.value
    sources = [s.strip() for text in _SOURCE.value for s in text.split(",") if s.strip()]
    given = {name: flag.value for name, flag in _OPTIONS.items() if flag.present}
    edit_dataset.check_operation(operation, sources, given)
    common = {
        "num_workers": _WORKERS.value,
        "overwrite": flags.FLAGS.overwrite,
        "dry_run": flags.FLAGS.dry_run,
    }
    if operation == "import_hdf5":
        given["video"] = given.pop("pictures", "") != "image"
        import_hdf5.run(sources[0], _OUTPUT.value, **given, **common)
    elif operation == "resize_rlds":
        resize_rlds.run(sources[0], _OUTPUT.value, **given, **common)
    else:
        request = edit_dataset.Request(**given)
        edit_dataset.run(operation, sources, _OUTPUT.value, request, **common)


if __name__ == "__main__":
    app.run(main)
