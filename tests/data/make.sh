#!/bin/sh
# Makes the files here, which PyAV's encoders cannot: 160 x 120, a moving pattern with noise.
# Made once, with FFmpeg 5.1.9 and MEncoder 1.5 of Debian 12; the tests read what is committed.
set -eu
cd "$(dirname "$0")"
source="testsrc2=size=160x120:rate=25:duration=1.92,noise=c0s=12:c0f=t:all_seed=7"

# Packed B-frames: two pictures in a chunk, then an empty one, and times that contradict the order.
ffmpeg -v error -y -f lavfi -i "$source" -c:v rawvideo -pix_fmt yuv420p raw.tmp.avi
mencoder raw.tmp.avi -really-quiet -noskip -o packed_xvid.avi -of avi \
  -ovc xvid -xvidencopts packed:max_bframes=2:bitrate=250:max_key_interval=20
rm raw.tmp.avi

ffmpeg -v error -y -f lavfi -i "$source" -c:v libtheora -q:v 4 -g 12 theora.ogv

# Reference pictures that are never shown, in packets of their own: of two passes only.
for pass in 1 2; do
  ffmpeg -v error -y -f lavfi -i "$source" -c:v libvpx -b:v 250k -g 20 -auto-alt-ref 1 \
    -lag-in-frames 16 -pass $pass -passlogfile pass.tmp hidden_vp8.webm
done
rm pass.tmp*
