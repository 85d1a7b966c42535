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

/// A stream runs the whole time, and every byte of it is right.
fn path_lost(server: Server) {
    let scene = Scene::new(server);
    let (web, gopher) = scene.pair(scene.host(), scene.host());
    direct(&web, &gopher);
    let streams = [
        flow(&web, &gopher, gopher.addresses[0], 8000),
        flow(&gopher, &web, web.addresses[0], 8001),
    ];
    scene.underlay.block_udp();
    arrives(&web, &gopher, gopher.addresses[0], 5);
    // Theirs trusts a path for 6.5 s.
    arrives(&gopher, &web, web.addresses[0], 5);
    // TCP itself tries again after 0.2 s, 0.4 s and so on: within as long as the path was lost.
    for stream in &streams {
        flows(stream, 15);
    }
    relayed(&web, &gopher);
    scene.underlay.unblock_udp();
    within(60, "the path is direct again", || {
        web.path_to("gopher") == "direct"
    });
    direct(&web, &gopher);
    for stream in streams {
        flows(&stream, 5);
        stream.finish();
    }
}
