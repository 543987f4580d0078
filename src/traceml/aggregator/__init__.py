"""The process that stores each row once and watches over the ranks."""
