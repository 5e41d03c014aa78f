from shrinkkit.tasks.task import Task as Task

__version__: str
