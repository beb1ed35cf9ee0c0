#!/bin/sh
# Installs PostgreSQL's server for the tests that start one of their own; makes no cluster and starts nothing.
set -eu
ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 && exit 0
if [ "$(id -u)" != 0 ]; then
  echo "error: expected PostgreSQL's server, found none" >&2
  echo "hint: apt-get install postgresql" >&2
  exit 1
fi
mkdir -p /etc/postgresql-common
echo "create_main_cluster = false" >/etc/postgresql-common/createcluster.conf
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends -o Dpkg::Options::=--force-confold postgresql >/dev/null
