#ifndef SMAP_COPENSSL_SHIM_H
#define SMAP_COPENSSL_SHIM_H

// Most of what is wrapped here are macros, hence invisible to Swift.
#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <stdint.h>

static inline int smap_tls_no_password(char *buffer, int size, int is_writing, void *data) {
    (void)buffer, (void)size, (void)is_writing, (void)data;
    return 0;
}

// Makes an encrypted private key an error. OpenSSL would ask for its pass phrase on the terminal, and wait.
static inline void smap_tls_never_ask(void *context) {
    SSL_CTX_set_default_passwd_cb((SSL_CTX *)context, smap_tls_no_password);
}

// Leaves with the context why OpenSSL refused the server's certificate.
static inline int smap_tls_verify(int is_fine, X509_STORE_CTX *store) {
    SSL *ssl = (SSL *)X509_STORE_CTX_get_ex_data(store, SSL_get_ex_data_X509_STORE_CTX_idx());
    if (!is_fine && ssl)
        SSL_CTX_set_app_data(SSL_get_SSL_CTX(ssl), (char *)(intptr_t)X509_STORE_CTX_get_error(store));
    return is_fine;
}

// Makes the handshake itself fail unless the server is who it should be and speaks TLS 1.2 or newer. `host` is a name or
// an address. 0 if something could not be set.
static inline int smap_tls_prepare(void *context, const char *host, int verify_peer, int verify_host,
                                   int use_system_authorities) {
    SSL_CTX *ssl = (SSL_CTX *)context;
    ERR_clear_error();
    if (!SSL_CTX_set_min_proto_version(ssl, TLS1_2_VERSION)) return 0;
    if (use_system_authorities && !SSL_CTX_set_default_verify_paths(ssl)) return 0;
    SSL_CTX_set_verify(ssl, verify_peer ? SSL_VERIFY_PEER : SSL_VERIFY_NONE, verify_peer ? smap_tls_verify : NULL);
    if (verify_peer && verify_host) {
        X509_VERIFY_PARAM *rules = SSL_CTX_get0_param(ssl);
        X509_VERIFY_PARAM_set_hostflags(rules, X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS);
        if (!X509_VERIFY_PARAM_set1_ip_asc(rules, host) && !X509_VERIFY_PARAM_set1_host(rules, host, 0)) return 0;
        ERR_clear_error();
    }
    return 1;
}

// What OpenSSL has against the server's certificate; NULL if nothing.
static inline const char *smap_tls_refusal_text(void *context) {
    intptr_t error = (intptr_t)SSL_CTX_get_app_data((SSL_CTX *)context);
    return error == X509_V_OK ? NULL : X509_verify_cert_error_string((long)error);
}

// What OpenSSL has against the handshake; NULL if nothing, or if the server just hung up.
static inline const char *smap_tls_failure_text(void) {
    unsigned long error = ERR_peek_last_error();
    if (error == 0 || ERR_GET_LIB(error) != ERR_LIB_SSL) return NULL;
#ifdef SSL_R_UNEXPECTED_EOF_WHILE_READING
    if (ERR_GET_REASON(error) == SSL_R_UNEXPECTED_EOF_WHILE_READING) return NULL;
#endif
    return ERR_reason_error_string(error);
}

// A client's session that reads from one BIO and writes to the other, which it then owns. NULL if memory is out.
static inline SSL *smap_tls_session(SSL_CTX *context, const char *host, BIO *incoming, BIO *outgoing) {
    SSL *ssl = SSL_new(context);
    if (!ssl) return NULL;
    // Between two records nothing but data is then ever asked of us.
    SSL_set_options(ssl, SSL_OP_NO_RENEGOTIATION);
    // RFC 6066: a name, never an address.
    ASN1_OCTET_STRING *address = a2i_IPADDRESS(host);
    if (address) ASN1_OCTET_STRING_free(address);
    else if (!SSL_set_tlsext_host_name(ssl, host)) { SSL_free(ssl); return NULL; }
    SSL_set_bio(ssl, incoming, outgoing);
    SSL_set_connect_state(ssl);
    return ssl;
}

#endif
