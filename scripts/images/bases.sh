#!/usr/bin/env bash
# Make the two base images of docker/*.Dockerfile from Debian packages, where no registry can be reached.
#
#   scripts/images/bases.sh FOLDER [MIRROR]     FOLDER keeps the roots and the packages; needs root
#
#   localhost/looper-build      a minimal Debian with python3.11 and venv (for BUILD_BASE, and BASE of the trainer)
#   localhost/looper-runtime    python3.11 and the libraries that it loads, unpacked: no shell, no package manager
set -euo pipefail
work=$1 mirror=${2:-http://deb.debian.org/debian} suite=bookworm
build=$work/build runtime=$work/runtime
mkdir -p "$work/debs"

if [ ! -e "$build/etc/debian_version" ]; then
  debootstrap --variant=minbase --cache-dir="$work/debs" --include=ca-certificates "$suite" "$build" "$mirror" \
    > "$work/debootstrap.log"
  cp /etc/resolv.conf "$build/etc/resolv.conf"
  chroot "$build" apt-get update --quiet --quiet
  DEBIAN_FRONTEND=noninteractive chroot "$build" apt-get install --quiet --quiet --yes --no-install-recommends \
    python3.11 python3.11-venv > "$work/apt.log"
  rm -rf "$build"/var/cache/apt/archives/*.deb "$build"/var/lib/apt/lists/*
fi

# What a Python with compiled wheels loads; the names are Debian's.
packages="base-files netbase tzdata libc6 libgcc-s1 libstdc++6 libgomp1 zlib1g libbz2-1.0 liblzma5 libexpat1 libffi8
  libssl3 libsqlite3-0 libuuid1 libdb5.3 libreadline8 libncursesw6 libtinfo6 libtirpc3 libnsl2 libcrypt1
  libgssapi-krb5-2 libkrb5-3 libk5crypto3 libkrb5support0 libcom-err2 libkeyutils1
  python3.11-minimal libpython3.11-minimal libpython3.11-stdlib media-types ca-certificates"
rm -rf "$runtime"
mkdir -p "$runtime"
(cd "$work/debs" && apt-get download --quiet --quiet -- $packages)
# Merged /usr, as in any Debian of today; dpkg follows these links.
for folder in bin sbin lib lib64; do
  mkdir -p "$runtime/usr/$folder"
  ln -s "usr/$folder" "$runtime/$folder"
done
for package in $packages; do
  dpkg-deb --fsys-tarfile "$(ls -t "$work/debs/$package"_*.deb | head -1)" |
    tar --extract --keep-directory-symlink --directory "$runtime" --exclude='./usr/share/doc/*' \
      --exclude='./usr/share/man/*' --exclude='./usr/share/lintian/*'
done
cp "$build/etc/ssl/certs/ca-certificates.crt" "$runtime/etc/ssl/certs/"
printf 'root:x:0:0:root:/root:/sbin/nologin\nnonroot:x:65532:65532:nonroot:/tmp:/sbin/nologin\n' > "$runtime/etc/passwd"
printf 'root:x:0:\nnonroot:x:65532:\n' > "$runtime/etc/group"
find "$runtime" -name '*.pl' -delete
find "$runtime/usr/bin" "$runtime/usr/sbin" -mindepth 1 ! -name 'python3*' -delete
rm -rf "$runtime/tmp" && install --directory --mode 1777 "$runtime/tmp"

for name in build runtime; do
  container=$(buildah from scratch)
  buildah add --quiet "$container" "$work/$name" / > /dev/null
  buildah config --cmd '' --author '' "$container"
  buildah commit --quiet --rm "$container" "localhost/looper-$name"
done
