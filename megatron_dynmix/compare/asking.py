"""lm-evaluation-harness in a process of its own: `python -m megatron_dynmix.compare.asking REQUEST ANSWER`.

What stands in for CUDA in our processes on a CPU would mislead it, so none of that is loaded here. Request
and answer are JSON files.
"""

import inspect
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_dynmix.job.launch import end_with_launcher

OURS = ("model", "tasks", "num_fewshot", "task_manager")
"""Arguments of `simple_evaluate` that this file gives."""


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Ask a Hugging Face folder some tasks; without one, tell only whether they can be asked.

    Args:
        request: `model` (or None), `tasks`, `shots` (None: those of the task), `include_path` and
            `arguments`, more ones of `simple_evaluate`.

    Returns:
        `results` by task or group, `refused` with what is wrong with the request, or `failed`.

    """
    from lm_eval import simple_evaluate

    arguments = {"log_samples": False, **request["arguments"]}
    free = [name for name in inspect.signature(simple_evaluate).parameters if name not in OURS]
    for name in arguments:
        if name not in free:
            return {"refused": f"--harness has no argument {name}; it has {', '.join(free)}"}
    tasks = request["tasks"]
    manager = _task_manager(request["include_path"], tasks)
    known, tags = set(manager.all_tasks), set(manager.all_tags)
    if unknown := [task for task in tasks if task not in known]:
        return {
            "refused": f"--tasks: there is no {', '.join(unknown)} in lm-evaluation-harness; `lm_eval ls "
            "tasks` lists all, and --include-path names a folder with task files of your own"
        }
    if several := [task for task in tasks if task in tags]:
        return {
            "refused": f"--tasks: {', '.join(several)} stands for several tasks without a score of its own; "
            "name them in a file, {COLUMN: {tasks: [TASK, ...]}}"
        }
    if request["model"] is None:
        return {"results": {}}
    arguments["model_args"] = {"pretrained": request["model"], **arguments.get("model_args", {})}
    try:
        found = simple_evaluate(
            model="hf", tasks=tasks, num_fewshot=request["shots"], task_manager=manager, **arguments
        )
    except Exception as error:  # of a task's code, of a data set that cannot be had
        return {"failed": f"{type(error).__name__}: {error}"}
    return {"results": {**found["results"], **found.get("groups", {})}}


def _task_manager(folders: Sequence[str], tasks: Sequence[str]) -> Any:
    """Return what knows the tasks; to read the harness' own takes half a minute, so only if one is asked."""
    from lm_eval.tasks import TaskManager

    if folders:
        own = TaskManager(include_path=list(folders), include_defaults=False)
        if set(tasks) <= set(own.all_tasks):
            return own
    return TaskManager(include_path=list(folders) or None)


if __name__ == "__main__":
    end_with_launcher()
    request_file, answer_file = map(Path, sys.argv[1:])
    found = answer(json.loads(request_file.read_text(encoding="utf-8")))
    answer_file.write_text(json.dumps(found, default=str), encoding="utf-8")
