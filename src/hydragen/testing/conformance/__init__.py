"""The suite that judges an attention kernel, as a command::

    pytest --pyargs hydragen.testing.conformance --implementation my_package.my_module:my_function

``my_function(problem, inputs)`` or ``my_function(problem)`` returns ``out`` or ``(out, lse)``. What it cannot
do is said by `Capabilities`, what it is known to do wrong by a file (`known`). Where hydragen is used from
its source tree without being installed, pytest needs ``-p hydragen.testing.conformance.plugin`` as well.
"""
