use crate::scene::*;

pub const CASES: &[Case] = &[
    ("direct.lan", ALL, lan),
    ("direct.ipv6", ALL, ipv6),
    ("direct.nat-both", ALL, nat_both),
    ("direct.nat-shared", ALL, nat_shared),
];

fn lan(server: Server) {
    let scene = Scene::new(server);
    let (web, gopher) = scene.pair(scene.host(), scene.host());
    direct(&web, &gopher);
    // With both beginnings, 100 MB each way.
    same_bytes(&web, &gopher, 50_000_000);
}

fn ipv6(server: Server) {
    let scene = Scene::new(server);
    let ours = scene.underlay.dual_host();
    let theirs = scene.underlay.dual_host();
    scene.underlay.block_udp();
    let (web, gopher) = scene.pair(ours, theirs);
    direct(&web, &gopher);
    same_bytes(&web, &gopher, 1_000_000);
}

fn nat_both(server: Server) {
    let scene = Scene::new(server);
    let (ours, theirs) = (scene.underlay.nat(), scene.underlay.nat());
    let (web, gopher) = scene.pair(ours.host(), theirs.host());
    direct(&web, &gopher);
    same_bytes(&web, &gopher, 1_000_000);
}

fn nat_shared(server: Server) {
    let scene = Scene::new(server);
    let nat = scene.underlay.nat();
    let (web, gopher) = scene.pair(nat.host(), nat.host());
    direct(&web, &gopher);
    same_bytes(&web, &gopher, 1_000_000);
}
