"""What is learned or chosen by looking at more than the error of a layer's rounding.

===================  ==============================================================================
``adaround``         Rounding and activation steps, learned unit by unit. ``unit_chain`` brings the
                     inputs, ``soft_unit`` and ``soft_layers`` stand for the layers meanwhile.
``tuning``           Codes and branches, learned from end to end; ``tuned_linear`` is a layer of it.
``allocation``       A group size for every site, among those that ``group_sizes`` allows.
``evolution``        The sizes by evolution. ``draws`` proposes them, ``history`` keeps losses.
``integer_program``  The sizes by an integer program; ``sensitivity`` says what each costs.
``sequential``       Second moments of inputs that went through the quantised layers before.
===================  ==============================================================================
"""
