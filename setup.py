"""What pyproject.toml cannot express: the folder `book` is installed as the package `sslbook.book`."""

from setuptools import find_packages, setup

book = [f"sslbook.{name}" for name in find_packages(include=["book", "book.*"])]
setup(packages=find_packages(include=["sslbook", "sslbook.*"]) + book, package_dir={"sslbook.book": "book"})
