"""The command line: constructors' signatures are the options, recipes their values."""
