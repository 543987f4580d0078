"""Tasks on threads and an event loop: submitted, waited for without deadlock, watched, and counted."""
