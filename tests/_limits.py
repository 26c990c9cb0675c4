"""What limits threads: the variables that name a number, and the files that say a control group's quota."""

LIMITS = dict(QKV_FAST_NUM_THREADS=None, OMP_NUM_THREADS=None)  # for a child process without either


def tree(root, files):
    """Writes files = {path: text} under root, which then stands for the root of a file system."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(root)
