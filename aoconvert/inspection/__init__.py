"""What a checkpoint is and what can load it, from headers alone: no pickle is run, torch and torchao are not needed."""
