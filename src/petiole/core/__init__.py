"""The few ideas everything else is made of: site, flow, plugin (roles), view, adapted model, proof."""
