"""`python -m verl_ascend_rollout.import_fix`, which the recipes evaluate in their shell: see `import_fix.main`."""

from verl_ascend_rollout.import_fix import main

if __name__ == "__main__":
    raise SystemExit(main())
