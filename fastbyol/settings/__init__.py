"""Typed settings: dataclasses, checked in one place, read from YAML and the command line.

messages      the error BadSetting; how messages show values and suggest names
types         check a value against a type, parse text into a value
limits        limits of values, for annotations such as Annotated[int, at_least(1)]
base          Settings, the base class of all settings
config_files  find a config: a file, or one that comes with the package
yaml_file     read a YAML file
commands      commands and their options
command_line  read a command line
help          help pages
"""
