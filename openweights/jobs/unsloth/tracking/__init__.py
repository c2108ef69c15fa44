"""What is measured while a model trains, and the jobs that only measure."""
