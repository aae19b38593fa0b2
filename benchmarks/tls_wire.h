/*
 * TLS for programs that do their own input and output.
 *
 * OpenSSL sees a BIO that reads from one span of received bytes and appends to
 * one buffer of bytes to send. Both belong to the process, not to a connection:
 * whoever handles a connection hands over what one recv() gave, lets OpenSSL
 * read until nothing is left of it, and sends the records that came of it by
 * one send(). Unfinished records are kept by OpenSSL.
 */
#ifndef TLS_WIRE_H
#define TLS_WIRE_H

#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* A record as large as it may be, with its header: so much may OpenSSL hold of the last one. */
#define MAX_RECORD_BYTES (SSL3_RT_MAX_ENCRYPTED_LENGTH + SSL3_RT_HEADER_LENGTH)

static struct {
    const char *input;   /* received and not yet read by OpenSSL */
    size_t input_len;
    char *output;        /* written by OpenSSL and not yet sent */
    size_t output_len;
    size_t output_size;
} wire;

static BIO_METHOD *wire_method;

static void tls_die(const char *what)
{
    fprintf(stderr, "%s: ", what);
    ERR_print_errors_fp(stderr);
    exit(2);
}

static int wire_read(BIO *bio, char *to, int len)
{
    BIO_clear_retry_flags(bio);
    if (wire.input_len == 0) {
        BIO_set_retry_read(bio);
        return -1;
    }
    size_t n = (size_t)len < wire.input_len ? (size_t)len : wire.input_len;
    memcpy(to, wire.input, n);
    wire.input += n;
    wire.input_len -= n;
    return (int)n;
}

static int wire_write(BIO *bio, const char *from, int len)
{
    BIO_clear_retry_flags(bio);
    if (wire.output_len + (size_t)len > wire.output_size) {
        wire.output_size = 2 * (wire.output_len + (size_t)len);
        wire.output = realloc(wire.output, wire.output_size);
        if (!wire.output)
            tls_die("memory");
    }
    memcpy(wire.output + wire.output_len, from, (size_t)len);
    wire.output_len += (size_t)len;
    return len;
}

static long wire_ctrl(BIO *bio, int command, long number, void *pointer)
{
    (void)bio, (void)number, (void)pointer;
    return command == BIO_CTRL_FLUSH; /* to OpenSSL all is sent at once */
}

static SSL_CTX *tls_context(const SSL_METHOD *method)
{
    SSL_CTX *context = SSL_CTX_new(method);
    wire_method = BIO_meth_new(BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, "wire");
    if (!context || !wire_method)
        tls_die("SSL_CTX_new");
    BIO_meth_set_read(wire_method, wire_read);
    BIO_meth_set_write(wire_method, wire_write);
    BIO_meth_set_ctrl(wire_method, wire_ctrl);
    return context;
}

static SSL *tls_new(SSL_CTX *context)
{
    SSL *ssl = SSL_new(context);
    BIO *bio = BIO_new(wire_method);
    if (!ssl || !bio)
        tls_die("SSL_new");
    BIO_set_init(bio, 1);
    SSL_set_bio(ssl, bio, bio);
    return ssl;
}

/* Why the connection failed, in OpenSSL's words. */
static inline const char *tls_reason(void)
{
    const char *reason = ERR_reason_error_string(ERR_peek_last_error());
    ERR_clear_error();
    return reason ? reason : "TLS failed";
}

#endif
