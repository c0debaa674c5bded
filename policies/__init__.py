"""The policies that come with gpusup, as YAML files beside this one."""
