#!/bin/sh
# certificate.sh AUTHORITY OUT [NAME...]: creates this node's certificate for Ray's TLS (RAY_USE_TLS).
# AUTHORITY is a folder with ca.crt and ca.key, created once for the cluster:
#
#   openssl req -x509 -newkey rsa:4096 -nodes -days 3650 -subj /CN=relay -keyout ca.key -out ca.crt
#
# Writes OUT/tls.crt and OUT/tls.key, valid for localhost, this node's addresses, and each NAME.
set -eu
authority=$1 out=$2
shift 2
mkdir -p "$out"
umask 077
names=DNS:localhost,IP:127.0.0.1
for address in $(hostname -i 2>/dev/null || true); do names=$names,IP:${address%%%*}; done
for name in "$@"; do names=$names,DNS:$name; done
printf 'subjectAltName=%s' "$names" > "$out/tls.ext"
openssl req -newkey rsa:2048 -nodes -subj /CN=relay -keyout "$out/tls.key" -out "$out/tls.csr"
openssl x509 -req -in "$out/tls.csr" -CA "$authority/ca.crt" -CAkey "$authority/ca.key" -set_serial "0x$(openssl rand -hex 16)" \
  -days 365 -extfile "$out/tls.ext" -out "$out/tls.crt"
