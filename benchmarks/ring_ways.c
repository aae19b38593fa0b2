/*
 * Other ways in which a ring can send and receive, next to those that the package takes: what each costs.
 *
 *     ring_ways send       a message of plaintext: send(2), IORING_OP_SEND, zero copies with and without a fixed buffer
 *     ring_ways receive    messages on N connections: poll and recv(2), multishot receives, bundles, incremental buffers
 *     ring_ways datagrams  bursts of datagrams: poll and recvmmsg(2), multishot recvmsg
 *     ring_ways napi       whether there is a NAPI instance that a ring could poll busily
 *
 * The measured thread has one core, its peer another.  A line is the way, the size (burst), connections, and the CPU
 * time of the measured thread for each message (datagram) in nanoseconds, the median of ROUNDS interleaved rounds.
 * A way that the kernel refuses is printed with its errno instead.  ring_ways.py compiles it and makes tables.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <liburing.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define ROUNDS 7
#define ROUND_NS 200000000LL
#define MAX_CONNECTIONS 16
#define MAX_MESSAGE (1 << 20)
#define AREA (1 << 20) /* bytes of provided buffers */
#define BURST_MAX 128
#define GROUP 1

/* What headers of older kernels do not have (include/uapi/linux/io_uring.h of Linux 6.12). */
#define RECVSEND_BUNDLE (1U << 4)
#define PBUF_RING_INC 2
#define CQE_F_BUF_MORE (1U << 4)
#define ZC_REPORT_USAGE (1U << 3)
#define ZC_COPIED (1U << 31)
#define REGISTER_NAPI 27

struct pbuf_reg {
    __u64 ring_addr;
    __u32 ring_entries;
    __u16 bgid, flags;
    __u64 resv[3];
};

static struct io_uring ring;
static struct io_uring_buf_ring *buffers;
static unsigned n_buffers, buffer_size;
static char *area, *message;
static int ours[MAX_CONNECTIONS], theirs[MAX_CONNECTIONS];
static volatile bool over;
static unsigned long n_copied, n_notified;

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static long long cpu_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static long long now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void pin(int cpu)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    sched_setaffinity(0, sizeof(set), &set);
}

/* --- sockets ---------------------------------------------------------------- */

static void open_sockets(int kind, int n)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof(address);
    int one = 1, large = 4 << 20, listener = socket(AF_INET, kind, 0);
    if (bind(listener, (void *)&address, length) || getsockname(listener, (void *)&address, &length))
        die("bind");
    if (kind == SOCK_STREAM && listen(listener, n))
        die("listen");
    for (int i = 0; i < n; i++) {
        theirs[i] = socket(AF_INET, kind, 0);
        setsockopt(theirs[i], SOL_SOCKET, SO_SNDBUF, &large, sizeof(large));
        if (connect(theirs[i], (void *)&address, length))
            die("connect");
        if (kind == SOCK_STREAM) {
            ours[i] = accept(listener, NULL, NULL);
            setsockopt(ours[i], IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
            setsockopt(theirs[i], IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
        } else {
            ours[i] = dup(listener);
            setsockopt(ours[i], SOL_SOCKET, SO_RCVBUF, &large, sizeof(large));
        }
    }
    close(listener);
}

static void close_sockets(int n)
{
    for (int i = 0; i < n; i++) {
        close(ours[i]);
        close(theirs[i]);
    }
}

/* --- the ring ------------------------------------------------------------------ */

static void open_ring(void)
{
    struct io_uring_params params = {.flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN |
                                              IORING_SETUP_CQSIZE, .cq_entries = 4096};
    int error = io_uring_queue_init_params(256, &ring, &params);
    if (error < 0) {
        errno = -error;
        die("io_uring (Linux 6.1 is needed)");
    }
}

static void give(unsigned id)
{
    io_uring_buf_ring_add(buffers, area + (size_t)id * buffer_size, buffer_size, id, io_uring_buf_ring_mask(n_buffers), 0);
    io_uring_buf_ring_advance(buffers, 1);
}

static int provide(unsigned size, unsigned flags)
{
    struct pbuf_reg reg = {.bgid = GROUP, .flags = flags};
    buffer_size = size;
    n_buffers = AREA / size;
    if (buffers == NULL)
        buffers = mmap(NULL, 1 << 16, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memset(buffers, 0, 1 << 16);
    reg.ring_addr = (unsigned long)buffers;
    reg.ring_entries = n_buffers;
    if (syscall(SYS_io_uring_register, ring.ring_fd, IORING_REGISTER_PBUF_RING, &reg, 1) < 0)
        return -errno;
    for (unsigned i = 0; i < n_buffers; i++)
        give(i);
    return 0;
}

static void submit_poll(int i)
{
    struct io_uring_sqe *sqe = io_uring_get_sqe(&ring);
    io_uring_prep_poll_multishot(sqe, ours[i], POLLIN);
    sqe->user_data = i;
}

static void submit_receive(int i, bool bundle)
{
    struct io_uring_sqe *sqe = io_uring_get_sqe(&ring);
    io_uring_prep_recv_multishot(sqe, ours[i], NULL, 0, 0);
    sqe->flags |= IOSQE_BUFFER_SELECT;
    sqe->buf_group = GROUP;
    sqe->user_data = i;
    if (bundle)
        sqe->ioprio |= RECVSEND_BUNDLE;
}

/* --- the peers -------------------------------------------------------------------- */

struct load {
    int n, size, burst;
};

static void *drain(void *argument)
{
    struct load *load = argument;
    char *into = malloc(MAX_MESSAGE);
    pin(1);
    while (recv(theirs[0], into, MAX_MESSAGE, MSG_TRUNC) > 0)
        ;
    free(into);
    return load;
}

/* A message to each connection, then an answer of a byte from each. */
static void *ask(void *argument)
{
    struct load *load = argument;
    char byte;
    pin(1);
    for (;;) {
        for (int i = 0; i < load->n; i++)
            for (int sent = 0, n; sent < load->size; sent += n)
                if ((n = send(theirs[i], message, load->size - sent, MSG_NOSIGNAL)) <= 0)
                    return NULL;
        for (int i = 0; i < load->n; i++)
            if (recv(theirs[i], &byte, 1, 0) <= 0)
                return NULL;
    }
}

/* A burst of datagrams, then an answer. */
static void *shoot(void *argument)
{
    struct load *load = argument;
    struct mmsghdr batch[BURST_MAX];
    struct iovec part = {message, load->size};
    struct timeval patience = {.tv_usec = 20000};
    char byte;
    pin(1);
    memset(batch, 0, sizeof(batch));
    for (int i = 0; i < load->burst; i++)
        batch[i].msg_hdr = (struct msghdr){.msg_iov = &part, .msg_iovlen = 1};
    setsockopt(theirs[0], SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
    while (!over) {
        sendmmsg(theirs[0], batch, load->burst, 0);
        recv(theirs[0], &byte, 1, 0);
    }
    return NULL;
}

/* --- the ways: each serves for ROUND_NS, and returns CPU per message, or -errno -------- */

static long long finish(long long begun, unsigned long served)
{
    return served ? (cpu_ns() - begun) / (long long)served : -ETIME;
}

static long long send_direct(struct load *load)
{
    long long begun = cpu_ns(), end = now_ns() + ROUND_NS;
    unsigned long served = 0;
    for (; now_ns() < end; served++)
        for (int sent = 0, n; sent < load->size; sent += n)
            if ((n = send(ours[0], message, load->size - sent, MSG_NOSIGNAL)) <= 0)
                die("send");
    return finish(begun, served);
}

static long long send_by_ring(struct load *load, bool zero_copy, bool fixed)
{
    long long begun = cpu_ns(), end = now_ns() + ROUND_NS;
    unsigned long served = 0;
    for (; now_ns() < end; served++) {
        struct io_uring_sqe *sqe = io_uring_get_sqe(&ring);
        struct io_uring_cqe *cqe;
        int awaited = 1;
        if (!zero_copy)
            io_uring_prep_send(sqe, ours[0], message, load->size, MSG_WAITALL | MSG_NOSIGNAL);
        else
            io_uring_prep_send_zc(sqe, ours[0], message, load->size, MSG_WAITALL | MSG_NOSIGNAL, ZC_REPORT_USAGE);
        if (fixed) {
            sqe->ioprio |= IORING_RECVSEND_FIXED_BUF;
            sqe->buf_index = 0;
        }
        while (awaited) {
            io_uring_submit_and_wait(&ring, 1);
            while (awaited && io_uring_peek_cqe(&ring, &cqe) == 0) {
                int result = cqe->res;
                unsigned flags = cqe->flags;
                io_uring_cqe_seen(&ring, cqe);
                if (flags & IORING_CQE_F_NOTIF) {
                    n_notified++;
                    n_copied += (result & ZC_COPIED) != 0;
                    awaited--;
                    continue;
                }
                awaited += (flags & IORING_CQE_F_MORE) != 0;
                awaited--;
                if (result < 0)
                    return result;
            }
        }
    }
    return finish(begun, served);
}

static long long send_ring(struct load *load) { return send_by_ring(load, false, false); }
static long long send_zc(struct load *load) { return send_by_ring(load, true, false); }
static long long send_zc_fixed(struct load *load) { return send_by_ring(load, true, true); }

static void answer(int i, long *got, int size, unsigned long *served)
{
    if (*got >= size) {
        *got -= size;
        ++*served;
        if (send(ours[i], "", 1, MSG_NOSIGNAL | MSG_DONTWAIT) != 1)
            die("answer");
    }
}

/* As the package receives in bulk: the poll tells, recv() takes what is there. */
static long long poll_recv(struct load *load)
{
    static char into[256 << 10];
    long long begun = cpu_ns(), end = now_ns() + ROUND_NS;
    unsigned long served = 0;
    long got[MAX_CONNECTIONS] = {0};
    struct io_uring_cqe *cqe;
    for (int i = 0; i < load->n; i++)
        submit_poll(i);
    while (now_ns() < end) {
        io_uring_submit_and_wait(&ring, 1);
        while (io_uring_peek_cqe(&ring, &cqe) == 0) {
            int i = (int)cqe->user_data;
            bool more = cqe->flags & IORING_CQE_F_MORE;
            ssize_t n;
            io_uring_cqe_seen(&ring, cqe);
            while ((n = recv(ours[i], into, sizeof(into), MSG_DONTWAIT)) > 0) {
                got[i] += n;
                answer(i, &got[i], load->size, &served);
                if (n < (ssize_t)sizeof(into))
                    break;
            }
            if (!more)
                submit_poll(i);
        }
    }
    return finish(begun, served);
}

static long long receive(struct load *load, unsigned size, unsigned flags, bool bundle)
{
    long long begun, end = now_ns() + ROUND_NS;
    unsigned long served = 0;
    long got[MAX_CONNECTIONS] = {0};
    struct io_uring_cqe *cqe;
    int error = provide(size, flags);
    if (error < 0)
        return error;
    begun = cpu_ns();
    for (int i = 0; i < load->n; i++)
        submit_receive(i, bundle);
    while (now_ns() < end) {
        io_uring_submit_and_wait(&ring, 1);
        while (io_uring_peek_cqe(&ring, &cqe) == 0) {
            int i = (int)cqe->user_data, n = cqe->res;
            unsigned what = cqe->flags, id = what >> IORING_CQE_BUFFER_SHIFT;
            io_uring_cqe_seen(&ring, cqe);
            if (n < 0 && n != -ENOBUFS)
                return n;
            if (n > 0) {
                got[i] += n;
                /* A bundle's buffers follow one another in the ring, which is filled in the order of use. */
                if (bundle)
                    for (int left = n; left > 0; left -= (int)size)
                        give(id), id = (id + 1) % n_buffers;
                else if (!(flags & PBUF_RING_INC) || !(what & CQE_F_BUF_MORE))
                    give(id);
                answer(i, &got[i], load->size, &served);
            }
            if (!(what & IORING_CQE_F_MORE))
                submit_receive(i, bundle);
        }
    }
    return finish(begun, served);
}

static long long multishot_4k(struct load *load) { return receive(load, 4 << 10, 0, false); }
static long long multishot_32k(struct load *load) { return receive(load, 32 << 10, 0, false); }
static long long bundle_4k(struct load *load) { return receive(load, 4 << 10, 0, true); }
static long long bundle_32k(struct load *load) { return receive(load, 32 << 10, 0, true); }
static long long incremental_64k(struct load *load) { return receive(load, 64 << 10, PBUF_RING_INC, false); }

static void answer_burst(struct load *load, struct sockaddr_in *peer, unsigned long got, unsigned long *answered)
{
    if (got - *answered >= (unsigned long)load->burst) {
        *answered = got;
        sendto(ours[0], "", 1, MSG_DONTWAIT, (void *)peer, sizeof(*peer));
    }
}

static long long poll_recvmmsg(struct load *load)
{
    static char into[BURST_MAX][2048];
    static struct sockaddr_in peers[BURST_MAX];
    static struct iovec parts[BURST_MAX];
    static struct mmsghdr batch[BURST_MAX];
    long long begun = cpu_ns(), end = now_ns() + ROUND_NS;
    unsigned long got = 0, answered = 0;
    struct io_uring_cqe *cqe;
    submit_poll(0);
    while (now_ns() < end) {
        struct __kernel_timespec patience = {.tv_nsec = 20000000};
        int n;
        io_uring_submit_and_wait_timeout(&ring, &cqe, 1, &patience, NULL);
        while (io_uring_peek_cqe(&ring, &cqe) == 0) {
            bool more = cqe->flags & IORING_CQE_F_MORE;
            io_uring_cqe_seen(&ring, cqe);
            do {
                for (int i = 0; i < BURST_MAX; i++) {
                    parts[i] = (struct iovec){into[i], sizeof(into[i])};
                    batch[i].msg_hdr = (struct msghdr){.msg_name = &peers[i], .msg_namelen = sizeof(peers[i]),
                                                       .msg_iov = &parts[i], .msg_iovlen = 1};
                }
                n = recvmmsg(ours[0], batch, BURST_MAX, MSG_DONTWAIT, NULL);
                if (n > 0) {
                    got += n;
                    answer_burst(load, &peers[n - 1], got, &answered);
                }
            } while (n == BURST_MAX);
            if (!more)
                submit_poll(0);
        }
    }
    return finish(begun, got);
}

static void submit_recvmsg(struct msghdr *layout)
{
    struct io_uring_sqe *sqe = io_uring_get_sqe(&ring);
    io_uring_prep_recvmsg_multishot(sqe, ours[0], layout, 0);
    sqe->flags |= IOSQE_BUFFER_SELECT;
    sqe->buf_group = GROUP;
}

static long long multishot_recvmsg(struct load *load)
{
    struct msghdr layout = {.msg_namelen = sizeof(struct sockaddr_in)};
    long long begun, end = now_ns() + ROUND_NS;
    unsigned long got = 0, answered = 0;
    struct io_uring_cqe *cqe;
    int error = provide(2048, 0);
    if (error < 0)
        return error;
    begun = cpu_ns();
    submit_recvmsg(&layout);
    while (now_ns() < end) {
        struct __kernel_timespec patience = {.tv_nsec = 20000000};
        io_uring_submit_and_wait_timeout(&ring, &cqe, 1, &patience, NULL);
        while (io_uring_peek_cqe(&ring, &cqe) == 0) {
            int n = cqe->res;
            unsigned what = cqe->flags, id = what >> IORING_CQE_BUFFER_SHIFT;
            io_uring_cqe_seen(&ring, cqe);
            if (n < 0 && n != -ENOBUFS)
                return n;
            if (n >= 0) {
                struct io_uring_recvmsg_out *out = io_uring_recvmsg_validate(area + (size_t)id * buffer_size, n, &layout);
                struct sockaddr_in peer = *(struct sockaddr_in *)io_uring_recvmsg_name(out);
                got++;
                give(id);
                answer_burst(load, &peer, got, &answered);
            }
            if (!(what & IORING_CQE_F_MORE))
                submit_recvmsg(&layout);
        }
    }
    return finish(begun, got);
}

/* --- rounds -------------------------------------------------------------------------- */

struct way {
    const char *name;
    long long (*serve)(struct load *);
};

static long long round_of(const struct way *way, int kind, void *(*peer)(void *), struct load *load)
{
    pthread_t thread;
    long long result;
    struct iovec part = {message, MAX_MESSAGE};
    open_sockets(kind, load->n);
    open_ring();
    io_uring_register_buffers(&ring, &part, 1);
    over = false;
    if (pthread_create(&thread, NULL, peer, load))
        die("thread");
    result = way->serve(load);
    over = true;
    for (int i = 0; i < load->n; i++)
        shutdown(ours[i], SHUT_RDWR);
    pthread_join(thread, NULL);
    io_uring_queue_exit(&ring);
    close_sockets(load->n);
    return result;
}

static int compare(const void *one, const void *other)
{
    long long a = *(const long long *)one, b = *(const long long *)other;
    return (a > b) - (a < b);
}

static void table(const struct way *ways, int n_ways, int kind, void *(*peer)(void *), struct load load)
{
    long long figures[8][ROUNDS];
    for (int round = 0; round < ROUNDS; round++)
        for (int k = 0; k < n_ways; k++) {
            int turn = (k + round) % n_ways;
            figures[turn][round] = round_of(&ways[turn], kind, peer, &load);
        }
    for (int k = 0; k < n_ways; k++) {
        qsort(figures[k], ROUNDS, sizeof(long long), compare);
        printf("%s %d %d %lld\n", ways[k].name, kind == SOCK_DGRAM ? load.burst : load.size, load.n,
               figures[k][ROUNDS / 2]);
        fflush(stdout);
    }
}

#define COUNT(list) ((int)(sizeof(list) / sizeof(list[0])))

static const struct way SENDS[] = {
    {"send(2)", send_direct}, {"ring", send_ring}, {"ring,zero-copy", send_zc}, {"ring,zero-copy,fixed", send_zc_fixed}};
static const struct way RECEIVES[] = {{"poll+recv(2)", poll_recv},   {"multishot,4K", multishot_4k},
                                      {"multishot,32K", multishot_32k}, {"bundle,4K", bundle_4k},
                                      {"bundle,32K", bundle_32k},    {"incremental,64K", incremental_64k}};
static const struct way DATAGRAMS[] = {{"poll+recvmmsg(2)", poll_recvmmsg}, {"multishot-recvmsg", multishot_recvmsg}};

static void look_for_napi(void)
{
    struct { __u32 timeout_us; __u8 prefer, opcode, pad[2]; __u32 op_param, resv; } napi = {.timeout_us = 50};
    socklen_t length = sizeof(int);
    int id = 0, refused;
    char byte;
    open_sockets(SOCK_STREAM, 1);
    open_ring();
    refused = (int)syscall(SYS_io_uring_register, ring.ring_fd, REGISTER_NAPI, &napi, 1) < 0 ? errno : 0;
    if (send(theirs[0], "", 1, 0) != 1 || recv(ours[0], &byte, 1, 0) != 1)
        die("send");
    getsockopt(ours[0], SOL_SOCKET, SO_INCOMING_NAPI_ID, &id, &length);
    printf("registration: %s; SO_INCOMING_NAPI_ID of a loopback connection: %d\n", refused ? strerror(refused) : "taken", id);
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "";
    pin(0);
    area = mmap(NULL, AREA, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    message = aligned_alloc(4096, MAX_MESSAGE);
    memset(message, 'x', MAX_MESSAGE);
    if (strcmp(what, "send") == 0) {
        for (int size = 16 << 10; size <= MAX_MESSAGE; size *= 4)
            table(SENDS, COUNT(SENDS), SOCK_STREAM, drain, (struct load){.n = 1, .size = size});
        printf("of %lu zero-copy sends the kernel copied %lu\n", n_notified, n_copied);
    } else if (strcmp(what, "receive") == 0) {
        for (int n = 1; n <= 10; n += 9)
            for (int size = 64; size <= 256 << 10; size *= size < 1024 ? 16 : size < 16384 ? 16 : 4)
                table(RECEIVES, COUNT(RECEIVES), SOCK_STREAM, ask, (struct load){.n = n, .size = size});
    } else if (strcmp(what, "datagrams") == 0) {
        for (int burst = 1; burst <= 100; burst *= 10)
            table(DATAGRAMS, COUNT(DATAGRAMS), SOCK_DGRAM, shoot, (struct load){.n = 1, .size = 64, .burst = burst});
    } else if (strcmp(what, "napi") == 0) {
        look_for_napi();
    } else {
        fprintf(stderr, "usage: %s send|receive|datagrams|napi\n", argv[0]);
        return 2;
    }
    return 0;
}
