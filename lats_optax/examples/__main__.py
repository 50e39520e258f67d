"""`python -m lats_optax.examples`: the list of the examples."""

from lats_optax import examples

if __name__ == "__main__":
    print(examples.__doc__)
