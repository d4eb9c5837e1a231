"""Train one stage: composer train.py yamls/stage1.yaml. See train/program.py, or --help."""

if __name__ == "__main__":
    from unitoken.train.program import start

    start()
