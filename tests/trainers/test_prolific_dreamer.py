"""ProlificDreamer: what its losses are, term by term; SDS as its special case; the particles it ends with."""

from fastdiff.trainers import ProlificDreamer
from fastdiff.trainers.method import Method

VARIANTS: dict[str, Method] = {
    "images-vsd": ProlificDreamer(particles=3, anneal_after=2),
    "images-cloud": ProlificDreamer(particles=3, anneal_after=2, score="cloud"),
    "voxels-vsd": ProlificDreamer(
        scene="voxels", scene_size=4, particles=2, anneal_after=2, entropy_weight=0.1, views=2, cameras=4, lr=1e-2
    ),
    "gaussians-sds": ProlificDreamer(scene="gaussians", scene_size=4, particles=2, anneal_after=2, score="sds", texture_only=True),
}
