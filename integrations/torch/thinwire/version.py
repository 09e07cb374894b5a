"""The version of the package: the one of pyproject.toml and CMakeLists.txt."""

__version__ = "0.1.0"
