"""Every setting of every command, once: the same frozen models serve YAML, flags, Tune and MLflow.

Unknown keys are refused and values are checked at birth. A field's docstring is its help text.
"""
