"""Makes a video in the background: `pip install openai`, then `python video_job.py "waves at dusk"`.

It needs a video model: `relay serve wan_tiny_cpu` serves one that draws moving noise.
"""

import os
import sys
import time

from openai import OpenAI

url = os.environ.get("RELAY_URL", "http://127.0.0.1:8000")
client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("RELAY_API_KEY", "none"))
prompt = sys.argv[1] if len(sys.argv) > 1 else "waves at dusk"

video = client.videos.create(prompt=prompt, extra_body={"num_frames": 9, "seed": 7})
print(f"{video.id}: {video.status}")  # the job survives a restart of the server
while video.status in ("queued", "in_progress"):
    time.sleep(1)
    video = client.videos.retrieve(video.id)
    print(f"{video.id}: {video.status}, {video.progress} %")
if video.status != "completed":
    sys.exit(f"{video.id}: {video.error.message if video.error else video.status}")
client.videos.download_content(video.id).write_to_file("video.mp4")
client.videos.delete(video.id)
print(f"video.mp4: {video.size}, seed {video.seed}")
