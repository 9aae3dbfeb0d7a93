"""Publishing a checkpoint on the Hugging Face Hub: ``run`` holds the whole way, the other modules its steps.

What the Hub client offers for folders (``upload_folder``) is not used: it makes several commits, so that a branch holds
half a model for a while, and a lost answer can leave one commit twice. Here the weights are uploaded first, before any
commit exists, and then one commit changes everything, on the condition that the branch is still as it was seen.
"""
