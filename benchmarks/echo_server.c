/*
 * The floor: the plainest good epoll echo server.
 *
 * One thread, level-triggered epoll. One hot receive buffer serves every
 * connection; what was received is sent at once. Only when the kernel takes
 * less than that is the rest copied aside, and the connection is not read
 * again before it has gone (EPOLLOUT), so memory stays bounded.
 *
 * Compiled with -DWITH_TLS it also serves TLS (--tls). One receive may bring
 * many records; the records of the echo leave by one send.
 *
 * With --udp one socket echoes datagrams: recvmmsg(2) takes what has come, one
 * sendmmsg(2) sends it back.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <getopt.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#ifdef WITH_TLS
#include "tls_wire.h"
#endif

#define BUFFER_BYTES (256u << 10)
#define MAX_EVENTS 1024
#define BACKLOG 4096
#define DATAGRAMS 64
#define MAX_DATAGRAM_BYTES 65536
#define UDP_BUFFER_BYTES (1u << 20) /* asked for; the kernel gives no more than its rmem_max, socket(7) */

struct connection {
    int fd;
    char *rest;        /* what a short send left over, NULL when nothing is pending */
    size_t rest_start;
    size_t rest_end;
#ifdef WITH_TLS
    SSL *ssl;
#endif
};

static int epoll_fd;
static char buffer[BUFFER_BYTES];

static void die(const char *what)
{
    perror(what);
    exit(2);
}

static void watch(int op, struct connection *c, unsigned mask)
{
    struct epoll_event event = {.events = mask, .data.ptr = c};
    if (epoll_ctl(epoll_fd, op, c->fd, &event) < 0)
        die("echo_server: epoll_ctl");
}

static void drop(struct connection *c)
{
    close(c->fd);
    free(c->rest);
#ifdef WITH_TLS
    SSL_free(c->ssl);
#endif
    free(c);
}

static void keep_rest(struct connection *c, const char *data, size_t len)
{
    c->rest = malloc(len);
    if (!c->rest)
        die("echo_server: malloc");
    memcpy(c->rest, data, len);
    c->rest_start = 0;
    c->rest_end = len;
    watch(EPOLL_CTL_MOD, c, EPOLLOUT);
}

/* False when the connection is lost. */
static bool send_or_keep(struct connection *c, const char *data, size_t len)
{
    ssize_t sent = send(c->fd, data, len, MSG_NOSIGNAL);
    if (sent < 0 && errno != EAGAIN)
        return false;
    if (sent < 0)
        sent = 0;
    if ((size_t)sent < len)
        keep_rest(c, data + sent, len - (size_t)sent);
    return true;
}

#ifdef WITH_TLS
static SSL_CTX *tls; /* NULL: no TLS */

/* Echoes what was received; false when the connection has ended. The handshake is done by SSL_read, too. */
static bool echo_records(struct connection *c, size_t got)
{
    static char record[SSL3_RT_MAX_PLAIN_LENGTH];
    int n = 0;
    wire.input = buffer;
    wire.input_len = got;
    wire.output_len = 0;
    /* OpenSSL takes all input, the beginning of a record included, before it asks for more. */
    while (wire.input_len && (n = SSL_read(c->ssl, record, sizeof record)) > 0)
        SSL_write(c->ssl, record, n);
    bool goes_on = n > 0 || SSL_get_error(c->ssl, n) == SSL_ERROR_WANT_READ;
    if (!goes_on) {
        SSL_shutdown(c->ssl);
        ERR_clear_error();
    }
    return (!wire.output_len || send_or_keep(c, wire.output, wire.output_len)) && goes_on;
}
#endif

static bool echo(struct connection *c, size_t got)
{
#ifdef WITH_TLS
    if (tls)
        return echo_records(c, got);
#endif
    return send_or_keep(c, buffer, got);
}

static void on_readable(struct connection *c)
{
    ssize_t got = recv(c->fd, buffer, BUFFER_BYTES, 0);
    if (got < 0 && errno == EAGAIN)
        return;
    if (got <= 0 || !echo(c, (size_t)got))
        drop(c);
}

static void on_writable(struct connection *c)
{
    ssize_t sent = send(c->fd, c->rest + c->rest_start, c->rest_end - c->rest_start, MSG_NOSIGNAL);
    if (sent < 0) {
        if (errno != EAGAIN)
            drop(c);
        return;
    }
    c->rest_start += (size_t)sent;
    if (c->rest_start < c->rest_end)
        return;
    free(c->rest);
    c->rest = NULL;
    watch(EPOLL_CTL_MOD, c, EPOLLIN);
}

static void on_accept(int listener, int is_tcp)
{
    int fd, one = 1;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        if (is_tcp)
            setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        struct connection *c = calloc(1, sizeof *c);
        if (!c)
            die("echo_server: calloc");
        c->fd = fd;
#ifdef WITH_TLS
        if (tls) {
            c->ssl = tls_new(tls);
            SSL_set_accept_state(c->ssl);
        }
#endif
        watch(EPOLL_CTL_ADD, c, EPOLLIN);
    }
}

#ifdef WITH_TLS
static void load_certificate(const char *cert, const char *key)
{
    tls = tls_context(TLS_server_method());
    /* Buffers are held only while they hold something, as in Python's ssl module: fewer of them stay in the cache. */
    SSL_CTX_set_mode(tls, SSL_MODE_RELEASE_BUFFERS);
    if (SSL_CTX_use_certificate_chain_file(tls, cert) != 1 ||
        SSL_CTX_use_PrivateKey_file(tls, key, SSL_FILETYPE_PEM) != 1)
        tls_die("echo_server: certificate");
}
#endif

static int listen_tcp(int port)
{
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons((unsigned short)port),
                            .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof a;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&a, sizeof a) < 0 || listen(fd, BACKLOG) < 0)
        die("echo_server: listen");
    if (getsockname(fd, (struct sockaddr *)&a, &len) < 0)
        die("echo_server: getsockname");
    printf("{\"port\": %d}\n", ntohs(a.sin_port));
    return fd;
}

static int listen_unix(const char *unix_path)
{
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    if (strlen(unix_path) >= sizeof a.sun_path) {
        fprintf(stderr, "echo_server: --unix path is too long\n");
        exit(2);
    }
    strcpy(a.sun_path, unix_path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&a, sizeof a) < 0 || listen(fd, BACKLOG) < 0)
        die("echo_server: listen");
    printf("{\"port\": 0}\n");
    return fd;
}

static void serve(int listener, int is_tcp)
{
    struct epoll_event events[MAX_EVENTS];
    /* The listener is the one entry without a connection. */
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL};
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listener, &event) < 0)
        die("echo_server: epoll_ctl");
    for (;;) {
        int n = epoll_wait(epoll_fd, events, MAX_EVENTS, -1);
        if (n < 0 && errno != EINTR)
            die("echo_server: epoll_wait");
        for (int i = 0; i < n; i++) {
            struct connection *c = events[i].data.ptr;
            if (!c)
                on_accept(listener, is_tcp);
            else if (c->rest)
                on_writable(c);
            else
                on_readable(c);
        }
    }
}

static int open_udp(int port)
{
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons((unsigned short)port),
                            .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof a;
    int size = UDP_BUFFER_BYTES;
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof size) < 0 ||
        bind(fd, (struct sockaddr *)&a, sizeof a) < 0)
        die("echo_server: UDP socket");
    if (getsockname(fd, (struct sockaddr *)&a, &len) < 0)
        die("echo_server: getsockname");
    printf("{\"port\": %d}\n", ntohs(a.sin_port));
    return fd;
}

static void serve_udp(int fd)
{
    static struct mmsghdr messages[DATAGRAMS];
    static struct iovec vectors[DATAGRAMS];
    static struct sockaddr_in senders[DATAGRAMS];
    static char data[DATAGRAMS][MAX_DATAGRAM_BYTES];
    struct epoll_event event = {.events = EPOLLIN};
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event) < 0)
        die("echo_server: epoll_ctl");
    for (;;) {
        if (epoll_wait(epoll_fd, &event, 1, -1) < 0 && errno != EINTR)
            die("echo_server: epoll_wait");
        for (int i = 0; i < DATAGRAMS; i++) {
            vectors[i] = (struct iovec){.iov_base = data[i], .iov_len = MAX_DATAGRAM_BYTES};
            messages[i].msg_hdr = (struct msghdr){.msg_name = &senders[i], .msg_namelen = sizeof senders[i],
                                                  .msg_iov = &vectors[i], .msg_iovlen = 1};
        }
        int n = recvmmsg(fd, messages, DATAGRAMS, 0, NULL);
        for (int i = 0; i < n; i++)
            vectors[i].iov_len = messages[i].msg_len;
        for (int sent = 0, more; sent < n; sent += more) {
            more = sendmmsg(fd, messages + sent, (unsigned)(n - sent), 0);
            if (more <= 0)
                break; /* no room: lost, as datagrams may be */
        }
    }
}

static int usage(void)
{
    fprintf(stderr, "usage: echo_server [--port PORT [--udp] | --unix PATH] [--seconds SECONDS]"
#ifdef WITH_TLS
                    " [--tls --cert FILE --key FILE]"
#endif
                    "\n");
    return 2;
}

int main(int argc, char **argv)
{
    static const struct option longs[] = {
        {"port", 1, 0, 'p'}, {"unix", 1, 0, 'u'}, {"seconds", 1, 0, 't'}, {"udp", 0, 0, 'U'},
#ifdef WITH_TLS
        {"tls", 0, 0, 'T'},  {"cert", 1, 0, 'C'}, {"key", 1, 0, 'K'},
#endif
        {0, 0, 0, 0}};
    const char *unix_path = NULL, *cert = NULL, *key = NULL;
    int port = 0, with_tls = 0, udp = 0, c;
    unsigned seconds = 600;
    while ((c = getopt_long(argc, argv, "", longs, NULL)) != -1) {
        switch (c) {
        case 'p': port = atoi(optarg); break;
        case 'u': unix_path = optarg; break;
        case 'U': udp = 1; break;
        case 't': seconds = (unsigned)atoi(optarg); break;
        case 'T': with_tls = 1; break;
        case 'C': cert = optarg; break;
        case 'K': key = optarg; break;
        default: return usage();
        }
    }
    if (with_tls != (cert && key) || (udp && (with_tls || unix_path)))
        return usage();
#ifdef WITH_TLS
    if (with_tls)
        load_certificate(cert, key);
#endif
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    alarm(seconds); /* never outlives a harness that died */
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (epoll_fd < 0)
        die("echo_server: epoll_create1");
    int listener = udp ? open_udp(port) : unix_path ? listen_unix(unix_path) : listen_tcp(port);
    fflush(stdout);
    if (udp)
        serve_udp(listener);
    serve(listener, !unix_path);
    return 0;
}
