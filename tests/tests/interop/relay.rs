use crate::scene::*;

pub const CASES: &[Case] = &[
    ("relay.udp-blocked", ALL, udp_blocked),
    ("relay.path-lost", ALL, path_lost),
];

fn udp_blocked(server: Server) {
    let scene = Scene::new(server);
    scene.underlay.block_udp();
    let (web, gopher) = scene.pair(scene.host(), scene.host());
    relayed(&web, &gopher);
    same_bytes(&web, &gopher, 1_000_000);
}

fn path_lost(server: Server) {
    let scene = Scene::new(server);
    let (web, gopher) = scene.pair(scene.host(), scene.host());
    direct(&web, &gopher);
    scene.underlay.block_udp();
    arrives(&web, &gopher, gopher.addresses[0], 5);
    // Theirs trusts a path for 6.5 s.
    arrives(&gopher, &web, web.addresses[0], 5);
    relayed(&web, &gopher);
    scene.underlay.unblock_udp();
    within(60, "the path is direct again", || {
        passes(&web, gopher.addresses[0]) && web.path_to("gopher") == "direct"
    });
    direct(&web, &gopher);
}
