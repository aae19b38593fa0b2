"""Name resolution by the loop's own thread: DNS through c-ares, /etc/hosts, and what glibc's rules make of them."""

from aiouringnet._resolver.resolver import Resolver
