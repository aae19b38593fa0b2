/* Lets system calls, allocations and OpenSSL's functions fail that the package's extension modules call.
 *
 * Preloaded (LD_PRELOAD), its functions stand before the libraries'.  A call counts only if it comes from one of our
 * modules: what Python, the loop and a test's peers do is theirs.  A *site* is a function's name and where it was
 * called from; for a submission to io_uring, the operation.  Rules say which calls at which site are refused, and how:
 * see struct rule.  Nothing happens before refusing_start().
 *
 * A submission is refused by the kernel itself: it becomes a NOP that completes with the error (Linux 6.10).
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/timerfd.h>
#include <sys/uio.h>
#include <unistd.h>

#define SITE __builtin_return_address(0)
#define EXPORT __attribute__((visibility("default")))
#define PACKAGE "/aiouringnet/"
#define NAME_BYTES 48
#define MODULE_BYTES 96
#define SITES 1024
#define RULES 4
#define CALLERS 8192

#define NOP_INJECT_RESULT 1 /* IORING_NOP_INJECT_RESULT; liburing 2.3 has not its name */

struct site {
	char name[NAME_BYTES];
	char module[MODULE_BYTES];
	unsigned long address; /* what rules name */
	unsigned long offset;  /* in its module */
	long calls;
};

struct rule {
	char name[NAME_BYTES];
	unsigned long address; /* 0: at every site */
	long first;            /* the call at which it begins, from 1 */
	long every;            /* and each so many after it */
	long times;            /* how many in all; -1: without an end */
	int value;             /* an errno, or negative: a result that is cut to so many bytes */
	long seen, hits;
};

static struct site sites[SITES];
static int n_sites;
static struct rule rules[RULES];
static int n_rules;
static int started, census;

/* --- whose call it is ---------------------------------------------------- */

static struct {
	void *address;
	int ours;
} callers[CALLERS];

static int is_ours(void *address)
{
	unsigned long at = ((unsigned long)address * 0x9E3779B97F4A7C15UL) >> 51;
	Dl_info info;

	while (callers[at].address && callers[at].address != address)
		at = (at + 1) % CALLERS;
	if (!callers[at].address) {
		callers[at].ours = dladdr(address, &info) && info.dli_fname && strstr(info.dli_fname, PACKAGE);
		callers[at].address = address;
	}
	return callers[at].ours;
}

static void count_site(const char *name, void *address)
{
	Dl_info info;
	struct site *site;
	int i;

	for (i = 0; i < n_sites; i++)
		if (sites[i].address == (unsigned long)address && !strcmp(sites[i].name, name)) {
			sites[i].calls++;
			return;
		}
	if (n_sites == SITES)
		return;
	site = &sites[n_sites++];
	strncpy(site->name, name, NAME_BYTES - 1);
	site->address = (unsigned long)address;
	site->calls = 1;
	if (site->address > 4096 && dladdr(address, &info)) {
		strncpy(site->module, strstr(info.dli_fname, PACKAGE) + strlen(PACKAGE), MODULE_BYTES - 1);
		site->offset = (unsigned long)address - (unsigned long)info.dli_fbase;
	}
}

/* Whether this call is refused; *value says how. */
static int judge(const char *name, void *address, int *value)
{
	struct rule *rule;

	if (census)
		count_site(name, address);
	for (rule = rules; rule < rules + n_rules; rule++) {
		if (rule->address && rule->address != (unsigned long)address)
			continue;
		if (strcmp(rule->name, name))
			continue;
		rule->seen++;
		if (rule->seen < rule->first || (rule->seen - rule->first) % rule->every)
			continue;
		if (rule->times >= 0 && rule->hits >= rule->times)
			continue;
		rule->hits++;
		*value = rule->value;
		return 1;
	}
	return 0;
}

static int refused(const char *name, void *address, int *value)
{
	return started && is_ours(address) && judge(name, address, value);
}

EXPORT void refusing_start(int only_count)
{
	census = only_count;
	started = 1;
}

EXPORT void refusing_stop(void)
{
	started = 0;
}

EXPORT int refusing_rule(const char *name, unsigned long address, long first, long every, long times, int value)
{
	struct rule *rule = &rules[n_rules];

	if (n_rules == RULES)
		return -1;
	memset(rule, 0, sizeof(*rule));
	strncpy(rule->name, name, NAME_BYTES - 1);
	rule->address = address;
	rule->first = first;
	rule->every = every;
	rule->times = times;
	rule->value = value;
	return n_rules++;
}

EXPORT long refusing_hits(void)
{
	long hits = 0;
	int i;

	for (i = 0; i < n_rules; i++)
		hits += rules[i].hits;
	return hits;
}

EXPORT int refusing_sites(struct site **found)
{
	*found = sites;
	return n_sites;
}

/* --- the libraries' own ---------------------------------------------------- */

static void *(*real_dlsym)(void *, const char *);

static void *next(const char *name)
{
	static const char *versions[] = {"GLIBC_2.34", "GLIBC_2.2.5", "GLIBC_2.17"};
	unsigned i;

	for (i = 0; !real_dlsym && i < 3; i++)
		real_dlsym = dlvsym(RTLD_NEXT, "dlsym", versions[i]);
	return real_dlsym(RTLD_NEXT, name);
}

#define REAL(name) \
	static __typeof__(name) *real; \
	if (!real) \
		real = next(#name)

/* A function that answers -1 and an errno; `shorten` is what a cut result changes. */
#define REFUSABLE(type, name, parameters, arguments, shorten) \
	EXPORT type name parameters \
	{ \
		int value; \
		REAL(name); \
		if (refused(#name, SITE, &value)) { \
			if (value > 0) { \
				errno = value; \
				return (type)-1; \
			} \
			shorten; \
		} \
		return real arguments; \
	}

static size_t least(size_t size, int value)
{
	return size < (size_t)-value ? size : (size_t)-value;
}

REFUSABLE(ssize_t, read, (int fd, void *data, size_t size), (fd, data, size), size = least(size, value))
REFUSABLE(ssize_t, write, (int fd, const void *data, size_t size), (fd, data, size), size = least(size, value))
REFUSABLE(ssize_t, recv, (int fd, void *data, size_t size, int flags), (fd, data, size, flags),
	  size = least(size, value))
REFUSABLE(ssize_t, send, (int fd, const void *data, size_t size, int flags), (fd, data, size, flags),
	  size = least(size, value))
REFUSABLE(ssize_t, sendto,
	  (int fd, const void *data, size_t size, int flags, const struct sockaddr *to, socklen_t length),
	  (fd, data, size, flags, to, length), (void)value)
REFUSABLE(ssize_t, recvmsg, (int fd, struct msghdr *message, int flags), (fd, message, flags), (void)value)
REFUSABLE(int, recvmmsg,
	  (int fd, struct mmsghdr *messages, unsigned n, int flags, struct timespec *limit),
	  (fd, messages, n, flags, limit), n = least(n, value))
REFUSABLE(int, sendmmsg, (int fd, struct mmsghdr *messages, unsigned n, int flags), (fd, messages, n, flags),
	  n = least(n, value))
REFUSABLE(ssize_t, sendfile64, (int out, int in, off64_t *offset, size_t size), (out, in, offset, size),
	  size = least(size, value))
REFUSABLE(int, accept4, (int fd, struct sockaddr *from, socklen_t *length, int flags), (fd, from, length, flags),
	  (void)value)
REFUSABLE(int, epoll_create1, (int flags), (flags), (void)value)
REFUSABLE(int, epoll_ctl, (int set, int op, int fd, struct epoll_event *event), (set, op, fd, event), (void)value)
REFUSABLE(int, epoll_wait, (int set, struct epoll_event *events, int n, int limit_ms), (set, events, n, limit_ms),
	  n = (int)least(n, value))
REFUSABLE(int, eventfd, (unsigned start, int flags), (start, flags), (void)value)
REFUSABLE(int, dup3, (int from, int to, int flags), (from, to, flags), (void)value)
REFUSABLE(int, poll, (struct pollfd *fds, nfds_t n, int limit_ms), (fds, n, limit_ms), (void)value)
REFUSABLE(int, setsockopt, (int fd, int level, int name, const void *data, socklen_t size),
	  (fd, level, name, data, size), (void)value)
REFUSABLE(int, getsockopt, (int fd, int level, int name, void *data, socklen_t *size), (fd, level, name, data, size),
	  (void)value)
REFUSABLE(int, shutdown, (int fd, int how), (fd, how), (void)value)
REFUSABLE(int, getsockname, (int fd, struct sockaddr *name, socklen_t *size), (fd, name, size), (void)value)
REFUSABLE(int, sockatmark, (int fd), (fd), (void)value)
REFUSABLE(int, socketpair, (int family, int type, int protocol, int pair[2]), (family, type, protocol, pair),
	  (void)value)
REFUSABLE(int, timerfd_create, (int clock, int flags), (clock, flags), (void)value)
REFUSABLE(int, timerfd_settime,
	  (int fd, int flags, const struct itimerspec *times, struct itimerspec *before), (fd, flags, times, before),
	  (void)value)
REFUSABLE(int, fstat64, (int fd, struct stat64 *status), (fd, status), (void)value)
REFUSABLE(int, stat64, (const char *path, struct stat64 *status), (path, status), (void)value)
REFUSABLE(int, unlink, (const char *path), (path), (void)value)
REFUSABLE(off64_t, lseek64, (int fd, off64_t offset, int whence), (fd, offset, whence), (void)value)
REFUSABLE(int, madvise, (void *address, size_t size, int advice), (address, size, advice), (void)value)

static const struct iovec *shortened(const struct iovec *vector, size_t n, int value, struct iovec *room)
{
	size_t i;

	for (i = 0; i < n && !vector[i].iov_len; i++)
		;
	if (i == n)
		return vector;
	*room = vector[i];
	room->iov_len = least(room->iov_len, value);
	return room;
}

EXPORT ssize_t writev(int fd, const struct iovec *vector, int n)
{
	struct iovec room;
	int value;
	REAL(writev);

	if (refused("writev", SITE, &value)) {
		if (value > 0) {
			errno = value;
			return -1;
		}
		vector = shortened(vector, n, value, &room);
		n = vector == &room ? 1 : n;
	}
	return real(fd, vector, n);
}

EXPORT ssize_t sendmsg(int fd, const struct msghdr *message, int flags)
{
	struct iovec room;
	struct msghdr less;
	int value, kind = 0;
	socklen_t size = sizeof(kind);
	REAL(sendmsg);

	if (refused("sendmsg", SITE, &value)) {
		if (value > 0) {
			errno = value;
			return -1;
		}
		less = *message;
		less.msg_iov = (struct iovec *)shortened(message->msg_iov, message->msg_iovlen, value, &room);
		if (less.msg_iov == &room)
			less.msg_iovlen = 1;
		/* A datagram goes whole, or not. */
		static __typeof__(getsockopt) *real_getsockopt;
		if (!real_getsockopt)
			real_getsockopt = next("getsockopt");
		if (!real_getsockopt(fd, SOL_SOCKET, SO_TYPE, &kind, &size) && kind == SOCK_STREAM)
			message = &less;
		return real(fd, message, flags);
	}
	return real(fd, message, flags);
}

EXPORT int close(int fd)
{
	int value;
	REAL(close);

	if (refused("close", SITE, &value) && value > 0) {
		real(fd); /* the number is free, whatever it says: close(2) */
		errno = value;
		return -1;
	}
	return real(fd);
}

EXPORT void *mmap64(void *address, size_t size, int protection, int flags, int fd, off64_t offset)
{
	int value;
	REAL(mmap64);

	if (refused("mmap64", SITE, &value) && value > 0) {
		errno = value;
		return MAP_FAILED;
	}
	return real(address, size, protection, flags, fd, offset);
}

EXPORT int fcntl64(int fd, int command, ...)
{
	__builtin_va_list list;
	void *argument;
	int value;
	static int (*real)(int, int, ...);

	if (!real)
		real = next("fcntl64");
	__builtin_va_start(list, command);
	argument = __builtin_va_arg(list, void *);
	__builtin_va_end(list);
	if (refused("fcntl64", SITE, &value) && value > 0) {
		errno = value;
		return -1;
	}
	return real(fd, command, argument);
}

/* --- memory ---------------------------------------------------------------- */

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);

EXPORT void *malloc(size_t size)
{
	int value;

	if (refused("malloc", SITE, &value)) {
		errno = ENOMEM;
		return NULL;
	}
	return __libc_malloc(size);
}

EXPORT void *calloc(size_t n, size_t size)
{
	int value;

	if (refused("calloc", SITE, &value)) {
		errno = ENOMEM;
		return NULL;
	}
	return __libc_calloc(n, size);
}

EXPORT void *realloc(void *block, size_t size)
{
	int value;

	if (refused("realloc", SITE, &value)) {
		errno = ENOMEM;
		return NULL;
	}
	return __libc_realloc(block, size);
}

/* --- io_uring -------------------------------------------------------------- */

/* Under a name of their own in C, since one liburing declares a signal set where a later one has any argument. */
#define REFUSABLE_RING(name, parameters, arguments) \
	EXPORT int refusable_##name parameters __asm__(#name); \
	int refusable_##name parameters \
	{ \
		int value; \
		REAL(name); \
		if (refused(#name, SITE, &value) && value > 0) \
			return -value; \
		return real arguments; \
	}

REFUSABLE_RING(io_uring_queue_init_params, (unsigned n, struct io_uring *ring, struct io_uring_params *params),
	       (n, ring, params))
REFUSABLE_RING(io_uring_register_buf_ring, (struct io_uring *ring, struct io_uring_buf_reg *reg, unsigned flags),
	       (ring, reg, flags))
REFUSABLE_RING(io_uring_register_eventfd, (struct io_uring *ring, int fd), (ring, fd))
REFUSABLE_RING(io_uring_ring_dontfork, (struct io_uring *ring), (ring))
REFUSABLE_RING(io_uring_enter2,
	       (unsigned fd, unsigned submitted, unsigned least_n, unsigned flags, void *argument, size_t size),
	       (fd, submitted, least_n, flags, argument, size))

EXPORT struct io_uring_probe *io_uring_get_probe_ring(struct io_uring *ring)
{
	int value;
	REAL(io_uring_get_probe_ring);

	return refused("io_uring_get_probe_ring", SITE, &value) ? NULL : real(ring);
}

/* Operations that were looked at before a submission was refused are not looked at again. */
static struct {
	struct io_uring *ring;
	unsigned seen;
} watched[16];

static const char *name_of(const struct io_uring_sqe *sqe)
{
	switch (sqe->opcode) {
	case IORING_OP_RECV:
		return "op RECV";
	case IORING_OP_SEND:
		return "op SEND";
	case IORING_OP_SENDMSG:
		return "op SENDMSG";
	case IORING_OP_POLL_ADD:
		return sqe->len & IORING_POLL_ADD_MULTI ? "op POLL_ADD multishot" : "op POLL_ADD";
	case IORING_OP_CONNECT:
		return "op CONNECT";
	case IORING_OP_ACCEPT:
		return "op ACCEPT";
	case IORING_OP_ASYNC_CANCEL:
		return "op ASYNC_CANCEL";
	default:
		return "op OTHER";
	}
}

static void look_at_operations(struct io_uring *ring)
{
	unsigned head = ring->sq.sqe_head, tail = ring->sq.sqe_tail, i;
	struct io_uring_sqe *sqe;
	int value, at, flags;
	unsigned long data, events;

	for (at = 0; at < 15 && watched[at].ring && watched[at].ring != ring; at++)
		;
	if (watched[at].ring != ring) {
		watched[at].ring = ring;
		watched[at].seen = head;
	}
	if (watched[at].seen - head <= tail - head)
		head = watched[at].seen;
	watched[at].seen = tail;
	for (i = head; i != tail; i++) {
		sqe = &ring->sq.sqes[i & (ring->sq.ring_entries - 1)];
		/* Polls for other events have other sites. */
		events = sqe->opcode == IORING_OP_POLL_ADD ? sqe->poll32_events & 0xFFF : 0;
		if (!judge(name_of(sqe), (void *)(events + 1), &value))
			continue;
		if (value < 0 && (sqe->opcode == IORING_OP_SEND)) {
			sqe->len = least(sqe->len, value);
			continue;
		}
		data = sqe->user_data;
		flags = sqe->flags & (IOSQE_CQE_SKIP_SUCCESS | IOSQE_ASYNC);
		memset(sqe, 0, sizeof(*sqe));
		sqe->opcode = IORING_OP_NOP;
		sqe->flags = flags;
		sqe->rw_flags = NOP_INJECT_RESULT;
		sqe->len = (unsigned)-value;
		sqe->user_data = data;
	}
}

/* What liburing does before the system call that is refused. */
static int refuse_submission(struct io_uring *ring, int value)
{
	if (ring->sq.sqe_head != ring->sq.sqe_tail) {
		ring->sq.sqe_head = ring->sq.sqe_tail;
		io_uring_smp_store_release(ring->sq.ktail, ring->sq.sqe_tail);
	}
	return -value;
}

#define REFUSABLE_SUBMISSION(name, parameters, arguments) \
	EXPORT int name parameters \
	{ \
		int value; \
		REAL(name); \
		if (started && is_ours(SITE)) { \
			look_at_operations(ring); \
			if (judge(#name, SITE, &value) && value > 0) \
				return refuse_submission(ring, value); \
		} \
		return real arguments; \
	}

REFUSABLE_SUBMISSION(io_uring_submit, (struct io_uring *ring), (ring))
REFUSABLE_SUBMISSION(io_uring_submit_and_get_events, (struct io_uring *ring), (ring))
REFUSABLE_SUBMISSION(io_uring_submit_and_wait_timeout,
		     (struct io_uring *ring, struct io_uring_cqe **cqe, unsigned n, struct __kernel_timespec *limit,
		      sigset_t *set),
		     (ring, cqe, n, limit, set))

/* Whether the kernel refuses a NOP as it is told. */
EXPORT int refusing_by_kernel(void)
{
	struct io_uring ring;
	struct io_uring_cqe *cqe;
	struct io_uring_sqe *sqe;
	int result = 0;

	if (io_uring_queue_init(2, &ring, 0) < 0)
		return 0;
	sqe = io_uring_get_sqe(&ring);
	memset(sqe, 0, sizeof(*sqe));
	sqe->opcode = IORING_OP_NOP;
	sqe->rw_flags = NOP_INJECT_RESULT;
	sqe->len = (unsigned)-ECHILD;
	if (io_uring_submit(&ring) == 1 && !io_uring_wait_cqe(&ring, &cqe))
		result = cqe->res == -ECHILD;
	io_uring_queue_exit(&ring);
	return result;
}

/* --- OpenSSL, which the package looks up by itself --------------------------- */

static struct {
	int (*read)(void *, void *, size_t, size_t *);
	int (*peek)(void *, void *, size_t, size_t *);
	int (*write)(void *, const void *, size_t, size_t *);
	int (*shutdown)(void *);
	int (*get_error)(void *, int);
	void (*set_bio)(void *, void *, void *);
	void *(*bio_new)(void *);
	void (*err_new)(void);
	void (*err_set)(int, int, const char *, ...);
} tls;

/* Connections that have failed: those fail from then on, for the ssl module, too. */
static struct {
	void *ssl;
	int value; /* 1: SSL_ERROR_SSL with a reason, as for memory; 5: SSL_ERROR_SYSCALL, and nothing in the queue */
} failed[64];

static int failure_of(void *ssl)
{
	int i;

	for (i = 0; i < 64; i++)
		if (failed[i].ssl == ssl)
			return failed[i].value;
	return 0;
}

static int fail_tls(void *ssl, int value)
{
	int i;

	for (i = 0; i < 63 && failed[i].ssl && failed[i].ssl != ssl; i++)
		;
	failed[i].ssl = ssl;
	failed[i].value = value;
	if (value == 1 && tls.err_new) {
		tls.err_new();
		tls.err_set(20 /* ERR_LIB_SSL */, 256 | 0x80000 /* ERR_R_MALLOC_FAILURE */, NULL);
	}
	return 0;
}

#define FAILS(name) \
	(value = failure_of(ssl), value || (refused(name, SITE, &value) && value > 0))

EXPORT int SSL_read_ex(void *ssl, void *data, size_t size, size_t *done)
{
	int value;

	if (FAILS("SSL_read_ex"))
		return fail_tls(ssl, value);
	if (value < 0)
		size = least(size, value);
	return tls.read(ssl, data, size, done);
}

EXPORT int SSL_peek_ex(void *ssl, void *data, size_t size, size_t *done)
{
	int value;

	if (FAILS("SSL_peek_ex"))
		return fail_tls(ssl, value);
	return tls.peek(ssl, data, size, done);
}

EXPORT int SSL_write_ex(void *ssl, const void *data, size_t size, size_t *done)
{
	int value;

	if (FAILS("SSL_write_ex"))
		return fail_tls(ssl, value);
	return tls.write(ssl, data, size, done);
}

EXPORT int SSL_shutdown(void *ssl)
{
	int value;

	if (FAILS("SSL_shutdown"))
		return fail_tls(ssl, value) - 1;
	return tls.shutdown(ssl);
}

EXPORT int SSL_get_error(void *ssl, int result)
{
	int value = failure_of(ssl);

	return value ? value : tls.get_error(ssl, result);
}

static void tls_set_bio(void *ssl, void *reads, void *writes)
{
	int i;

	/* A new one, where a failed one was. */
	for (i = 0; i < 64; i++)
		if (failed[i].ssl == ssl)
			failed[i].value = 0;
	tls.set_bio(ssl, reads, writes);
}

static void *tls_bio_new(void *method)
{
	int value;

	return refused("BIO_new", SITE, &value) ? NULL : tls.bio_new(method);
}

EXPORT void *dlsym(void *handle, const char *name)
{
	static const struct {
		const char *name;
		void *ours, **theirs;
	} wrapped[] = {
		{"SSL_read_ex", SSL_read_ex, (void **)&tls.read},
		{"SSL_peek_ex", SSL_peek_ex, (void **)&tls.peek},
		{"SSL_write_ex", SSL_write_ex, (void **)&tls.write},
		{"SSL_shutdown", SSL_shutdown, (void **)&tls.shutdown},
		{"SSL_get_error", SSL_get_error, (void **)&tls.get_error},
		{"SSL_set_bio", tls_set_bio, (void **)&tls.set_bio},
		{"BIO_new", tls_bio_new, (void **)&tls.bio_new},
	};
	unsigned i;

	if (!real_dlsym)
		next("dlsym");
	if (is_ours(SITE))
		for (i = 0; i < sizeof(wrapped) / sizeof(*wrapped); i++)
			if (!strcmp(name, wrapped[i].name)) {
				*wrapped[i].theirs = real_dlsym(handle, name);
				tls.err_new = real_dlsym(handle, "ERR_new");
				tls.err_set = real_dlsym(handle, "ERR_set_error");
				return *wrapped[i].theirs ? wrapped[i].ours : NULL;
			}
	return real_dlsym(handle, name); /* a tail call: whose RTLD_NEXT it is stays right */
}
